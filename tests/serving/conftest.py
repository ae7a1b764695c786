import pytest


@pytest.fixture(scope="package")
def address(tiny_model, tiny_processor):
    """Of a server with low limits."""
    from tests.serving.servers import running

    with running(tiny_model, tiny_processor, max_body=1, max_pixels=40_000, max_images=4) as address:
        yield address
