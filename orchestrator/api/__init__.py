"""The API under `/api/v1`, and health and metrics, as ASGI applications; what serves them is the gateway's affair."""

from orchestrator.api.app import make_app
from orchestrator.api.health import make_health
from orchestrator.tokens import check_exposure

__all__ = ["check_exposure", "make_app", "make_health"]
