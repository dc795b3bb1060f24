import pytest

from tests.judge_server import JudgeServer
from tests.servers import serve


@pytest.fixture
def judge():
    """A running judge server."""
    server = JudgeServer()
    with serve(server.app) as server.url:
        yield server
