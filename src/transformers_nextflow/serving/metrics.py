"""What a server tells of itself to Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        of: dict = {"registry": self.registry, "namespace": "nextflow"}
        self.requests = Counter("requests", "Requests that ended.", ["path", "status"], **of)
        self.seconds = Histogram("request_seconds", "From a request's head to the end of its answer.", ["path"], **of)
        buckets = (1, 2, 4, 8, 16, 32, 64)
        self.batches = Histogram("batch_requests", "Requests that were drawn together.", buckets=buckets, **of)
        self.pictures = Histogram("batch_pictures", "Pictures that were drawn at once.", buckets=buckets, **of)
        self.waiting = Gauge("requests_waiting", "Requests in the queue.", **of)
        self.running = Gauge("requests_running", "Requests that are drawn.", **of)


class Counted:
    """Middleware of ASGI that counts and times requests, by the path they are routed to."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, start = 500, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = scope.get("route")  # of any other path there may be as many as a client likes
            path = "other" if route is None else route.path
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
