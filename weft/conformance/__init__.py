"""Conformance to what others publish: suites of samples, each counted by what weft did with them.

A suite is a module of this folder with `run(data) -> Count`; `weft conformance SUITE` runs it over a folder of data, which is
never part of the package.
"""
