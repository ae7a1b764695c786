"""What a server tells of itself to Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


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
