"""Programs for people who work on weft; none of it is installed with the package."""
