"""One thread: tiny networks are slower on several, much slower next to other work."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread):
    pass
