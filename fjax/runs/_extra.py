"""What the extra ``fjax[runs]`` brings, asked for before anything that needs it."""

from fjax._optional import import_optional

for _package in ("rich", "matplotlib"):
    import_optional(_package, extra="runs")
