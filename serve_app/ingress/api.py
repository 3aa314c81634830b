"""The FastAPI application that the classes of the ingress put their routes on."""

from __future__ import annotations

from serve_app.ingress.http import make_api
from serve_app.ingress.metrics import deployment_meter

api = make_api(meter_of=deployment_meter)
