"""Generated tests: what every technique, and every pair of techniques, must keep of what it declares.

workload   requests that make techniques work: shared prefixes, repetition, forks, contention, a second round
code       what a file says to Python, by which kept results know whether it changed
lab        runs a stack over the workload on the bundled model, and remembers what came out
law        distributions compared: chi-square with a stated power
checks     the tests of one technique (`weft conform`)
outside    those of routes, placements and costs, which are no part of an engine
pairs      the tests of two together, over the whole registry
"""
