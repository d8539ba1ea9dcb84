"""One thread: tiny networks are slower on several, much slower where other work runs at the same time."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread):
    pass
