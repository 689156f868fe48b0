"""`minillm serve`: who may ask, where it listens, and how it stops. One test has a process of its own, with TLS."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from minillm import UserError
from minillm.cli.main import main
from minillm.cli.serve import listen, open_served
from minillm.config.models import ServedTeacherConfig
from minillm.models.batch import TokenSequence, collate
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer
from minillm.teachers.served import ServedTeacher
from tests.conftest import tiny_llama


@pytest.fixture
def teacher(tmp_path):
    save_model(tiny_llama(vocab_size=257, hidden_size=48, seed=1), byte_tokenizer(), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_machines_need_a_token(host, monkeypatch, capsys):
    monkeypatch.delenv("MINILLM_TOKEN", raising=False)
    assert main(["serve", "anything", "--host", host]) == 2
    said = capsys.readouterr().err
    assert f"--host {host} lets other machines ask, and there is no token: set MINILLM_TOKEN" in said


@pytest.mark.parametrize("token", ["", "two\nlines", "schlüssel"])
def test_a_token_is_one(token, monkeypatch, capsys):
    monkeypatch.setenv("OTHER", token)
    assert main(["serve", "anything", "--token-env", "OTHER"]) == 2
    assert "OTHER holds no token" in capsys.readouterr().err


def test_a_certificate_has_a_key(tmp_path, capsys):
    assert main(["serve", "anything", "--tls-cert", "cert.pem"]) == 2
    assert "--tls-cert and --tls-key go together" in capsys.readouterr().err
    (tmp_path / "cert.pem").write_text("nothing")
    files = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "cert.pem")]
    assert main(["serve", "anything", *files]) == 2
    assert f"--tls-cert {tmp_path / 'cert.pem'}" in capsys.readouterr().err


def test_an_address_that_is_taken_is_said(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: .*in use"):
            listen("127.0.0.1", port)


def test_a_model_that_is_not_there_is_said(capsys, monkeypatch):
    monkeypatch.delenv("MINILLM_TOKEN", raising=False)
    assert main(["serve", "./nothing", "--port", "0"]) == 2
    assert "./nothing: no such folder" in capsys.readouterr().err


def test_a_server_without_its_packages_says_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "minillm.cli.serve")
    assert main(["serve", "anything"]) == 2
    assert "`minillm serve` needs uvicorn, which is not installed: pip install -e '.[serve]'" in capsys.readouterr().err


def test_the_name_of_a_served_model_is_as_it_was_given(teacher):
    assert open_served(str(teacher), device="cpu").described["model"] == str(teacher)
    with pytest.raises(UserError, match="^--device is 'meta'; it must be"):
        open_served(str(teacher), device="meta")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_a_process_with_tls_and_a_token_stops_when_it_is_told_to(teacher, tmp_path, monkeypatch):
    files = Namespace(key=tmp_path / "key.pem", cert=tmp_path / "cert.pem")
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(files.key), "-out", str(files.cert)]
    subprocess.run([*request, *names], check=True, capture_output=True)
    tls = ["--tls-cert", str(files.cert), "--tls-key", str(files.key)]
    words = [sys.executable, "-m", "minillm", "serve", str(teacher), "--port", "0", "--device", "cpu", *tls]
    environment = {**os.environ, "MINILLM_TOKEN": "secret"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            line = server.stdout.readline()
            assert "257 ids, float32) at https://127.0.0.1:" in line and line.endswith("with a token\n")
            monkeypatch.setenv("MINILLM_TOKEN", "secret")
            keys = {"url": line.split(" at ")[1].split(",")[0], "token_env": "MINILLM_TOKEN", "patience_seconds": 0.0}
            config = ServedTeacherConfig(type="served", **keys)
            with pytest.raises(UserError, match="certificate verify failed"):
                ServedTeacher(config, torch.device("cpu"))
            monkeypatch.setenv("SSL_CERT_FILE", str(files.cert))
            client = ServedTeacher(config, torch.device("cpu"))
            assert len(client.rows(collate([TokenSequence([1], [2, 3])], 0)).wait()) == 2
            client.close()  # else TLS waits for its goodbye
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(90) == 0
