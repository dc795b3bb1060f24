import pytest

from tests.checksum_judge import JudgeServer
from tests.servers import serve


@pytest.fixture
def judge():
    """A running judge server."""
    server = JudgeServer()
    with serve(server.app) as server.url:
        yield server
