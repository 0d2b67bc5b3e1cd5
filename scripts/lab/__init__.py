"""The laboratory: what measures the design for us.

`python scripts/lab` lists the experiments.  It imports the package, and never the other way round;
a wheel holds none of it.
"""
