"""Moved to `fjax.rejection`; this path stays."""

from fjax.rejection import RejectionEstimate, accept, estimate_rejection, log_acceptance

__all__ = ["RejectionEstimate", "accept", "estimate_rejection", "log_acceptance"]
