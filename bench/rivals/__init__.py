"""weft beside other engines on the same machine: `python -m bench.rivals`, or `make rivals`.

`plan` reads what is asked, `venvs` makes an environment for each rival, `checkpoint` draws weights that all of them get,
`process` runs each engine's driver as a process of its own, `measure` lets them take turns, `report` writes what came out.
The drivers (`*_driver.py`) run under their engine's Python and import nothing of weft but `protocol`; weft's own imports weft.
"""
