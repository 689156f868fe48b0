import pytest


@pytest.fixture
def picture():
    """Asked for by the tests that need curves.png; the others do without, for they would spend their time on it."""


@pytest.fixture(autouse=True)
def text_alone(request, monkeypatch):
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("minillm.reporting.report.draw_run", lambda run, path: False)
