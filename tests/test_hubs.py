"""The hubs' own clients, `huggingface_hub` and `kagglehub`, against a server on this machine."""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse

import pytest

import phi3_ref

ROOT = pathlib.Path(phi3_ref.__file__).parent
EMBEDDED = ROOT / "notebooks" / "presets" / "phi3_tiny_puzzles_en"
FILES = {str(path.relative_to(EMBEDDED)): path.read_bytes()
         for path in EMBEDDED.rglob("*") if path.is_file()}
WEIGHTS = "model.weights.h5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = COMMIT[::-1]
PRESETS = {"hf": "hf://acme/tiny-phi", "kaggle": "kaggle://acme/phi3/keras/tiny/1"}
LOADER = """
import json, os, sys
import huggingface_hub.constants
import kagglesdk.kaggle_env as env
import phi3_ref

huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**20  # Kaggle's; 10 MB are more than we serve

env._env_to_endpoint[env.KaggleEnv.PROD] = os.environ["KAGGLE_ENDPOINT"]
preset, what = sys.argv[1:]
try:
    if what == "summary":
        phi3_ref.main(["--summary", "--preset", preset])
    elif what == "tokenizer":
        phi3_ref.Phi3Tokenizer.from_preset(preset)
    else:
        causal_lm = phi3_ref.Phi3CausalLM.from_preset(preset, load_weights=what == "all")
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
    sys.exit()
if what != "all":
    print(json.dumps(["loaded", what]))
elif causal_lm.preprocessor is None:
    print(json.dumps(["loaded", "no tokenizer"]))
else:
    causal_lm.compile(sampler="greedy")
    message = [{"role": "user", "content": "What is 345 + 278?"}]
    text = causal_lm.preprocessor.tokenizer.apply_chat_template(message)
    print(json.dumps(["loaded", causal_lm.generate(text, strip_prompt=True)]))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Both hubs in one: what it serves, what goes wrong, and what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.commits = {COMMIT: self.files}
        self.revisions = {"main": [COMMIT]}  # name -> what it stands for, in turn
        self.statuses = {}  # file name, or "" for all -> list of statuses to answer with, in turn
        self.cuts = {}  # file name -> list of byte counts after which the connection breaks
        self.lies = {}  # file name -> what is sent instead, under the right checksum
        self.asked = []  # (commit or None, file name) of every question for a file
        self.sent = []  # (file name, first byte) of every content that was asked for

    def handle_error(self, request, address):
        """A client that hangs up is no news."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers like huggingface.co and api.kaggle.com, as far as the clients ask."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):  # Kaggle: where a file is
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = request["path"]
        self.server.asked.append((None, name))
        if not self.refused(name, self.server.files):
            self.answer(302, {"Location": f"{self.server.url}/storage/{name}"})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        stored = re.fullmatch("/storage/(.*)", path)
        resolved = re.fullmatch("/acme/tiny-phi/resolve/([^/]+)/(.*)", path)
        told = re.fullmatch("/api/models/acme/tiny-phi(?:/(revision|tree)/([^/]+))?", path)
        if stored:
            self.send_file(stored[1], self.server.files[stored[1]])
        elif resolved:
            commit, name = resolved.groups()
            if self.command == "HEAD":
                self.server.asked.append((commit, name))
            files = self.server.commits[commit]  # no file is asked for by a branch or a tag
            if not self.refused(name, files):
                self.send_file(name, files[name], commit)
        elif told:
            # A gated repository tells everyone what it holds.
            if self.server.statuses.get("") == [403] or not self.refused("", {"": None}):
                self.tell(told[1], urllib.parse.unquote(told[2] or "main"))
        else:
            self.answer(404)

    def tell(self, what, revision):
        """Answer what commit a revision is, and its files; or what there is to know of these."""
        turns = self.server.revisions.get(revision, [revision])
        commit = turns.pop(0) if len(turns) > 1 else turns[0]
        if commit not in self.server.commits:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        files = self.server.commits[commit]
        tree = [{"type": "file", "path": name, "size": len(content),
                 "oid": hashlib.sha1(content).hexdigest()} for name, content in files.items()]
        info = {"id": "acme/tiny-phi", "modelId": "acme/tiny-phi", "sha": commit,
                "siblings": [{"rfilename": name} for name in files]}
        content = json.dumps(tree if what == "tree" else info).encode()
        self.answer(200, {"Content-Type": "application/json"}, content)

    def refused(self, name, files):
        """Answer with the status that was planned, if any is; or that there is no such file."""
        planned = self.server.statuses.get(name) or self.server.statuses.get("") or [200]
        status = planned.pop(0) if len(planned) > 1 else planned[0]
        if status == 200 and name not in files:
            status = 404
        if status == 200:
            return False
        codes = {403: "GatedRepo", 401: "RepoNotFound"}
        code = codes.get(status, "EntryNotFound" if status == 404 else "")
        if status == 404 and self.server.statuses.get(""):
            code = "RepoNotFound"
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": f"planned {status}"})
        return True

    def answer(self, status, headers=None, content=b""):
        self.send_response(status)
        headers = {"Content-Length": str(len(content))} | (headers or {})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, name, content, commit=""):
        checksum = base64.b64encode(hashlib.md5(content).digest()).decode()
        etag = hashlib.sha256(content).hexdigest()
        if self.command == "GET":  # what HEAD announces is right
            content = self.server.lies.get(name, content)
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if "Range" in self.headers else 200)
        for key, value in {
            "Content-Length": len(content) - first, "Accept-Ranges": "bytes", "ETag": f'"{etag}"',
            "X-Repo-Commit": commit, "X-Goog-Hash": f"md5={checksum}",
            "Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}",
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.sent.append((name, first))
        cuts = self.server.cuts.get(name)
        if cuts:
            self.wfile.write(content[first : first + cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(content[first:])


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["hf", "kaggle"])
def load(request, hub, tmp_path):
    """Load the hub's preset in a fresh process: (kind of outcome, answer or message).

    What is loaded is "all" of a causal LM, a "causal_lm" without weights, a "tokenizer", or what
    the command line needs for a "summary".
    """

    def load(what="all", revision="", **environment):
        environment = {
            **{key: value for key, value in os.environ.items()
               if not key.startswith(("HF_", "KAGGLE", "HUGGING"))},
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "KAGGLE_ENDPOINT": hub.url, "KAGGLEHUB_CACHE": str(tmp_path / "kaggle"),
            "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", **environment,
        }
        preset = PRESETS[request.param] + revision
        run = subprocess.run([sys.executable, "-c", LOADER, preset, what], cwd=ROOT,
                             env=environment, text=True, capture_output=True, timeout=100)
        assert run.returncode == 0, run.stderr
        return tuple(json.loads(run.stdout.splitlines()[-1]))

    load.hub = request.param
    return load


ANSWER = ("loaded", "623<|end|>")
only_hugging_face = pytest.mark.parametrize("load", ["hf"], indirect=True)


def test_a_preset_is_fetched_once(load, hub):
    """Only the files that are needed, each once and whole; a second load asks for none."""
    assert load() == ANSWER
    names = ["assets/tokenizer/vocabulary.spm", "config.json", WEIGHTS, "preprocessor.json",
             "tokenizer.json"]
    assert sorted(hub.sent) == sorted((name, 0) for name in names)
    assert sorted(name for _, name in hub.asked) == sorted(names)
    assert load() == ANSWER
    assert len(hub.asked) == len(hub.sent) == len(names)


@pytest.mark.parametrize("status, kind, advice", [
    (401, "PermissionError", "check the name, or log in"),
    (403, "PermissionError", "accept the model's terms"),
    (404, "FileNotFoundError", "check the name"),
])
def test_a_refusal_says_what_to_do(load, hub, status, kind, advice):
    """No such repository, a private one, a gated one; and nothing is kept of it."""
    hub.statuses[""] = [status]
    found, message = load()
    assert found == kind and advice in message and PRESETS[load.hub] in message
    assert str(status) in message and hub.sent == []
    hub.statuses.clear()
    assert load() == ANSWER


def test_an_error_of_the_server_passes(load, hub):
    """Hugging Face's client tries again by itself; after Kaggle's, the user does."""
    hub.statuses[WEIGHTS] = [500, 200]
    outcome = load()
    if load.hub == "kaggle":
        assert outcome[0] == "ConnectionError" and "try again" in outcome[1] and "500" in outcome[1]
        assert WEIGHTS in outcome[1]
        outcome = load()
    assert outcome == ANSWER
    assert [name for name, _ in hub.sent].count("config.json") == 1


def test_a_broken_connection_is_resumed(load, hub):
    """Bytes that have come are not asked for again: by the client, or when the user tries again."""
    hub.cuts[WEIGHTS] = [1_500_000]  # both clients write a MiB at a time
    outcome = load()
    if load.hub == "kaggle":
        assert outcome[0] == "ConnectionError" and "try again" in outcome[1]
        outcome = load()
    assert outcome == ANSWER
    assert hub.cuts[WEIGHTS] == []
    parts = [first for name, first in hub.sent if name == WEIGHTS]
    assert parts[0] == 0 and parts[-1] in (2**20, 1_500_000)


@pytest.mark.parametrize("length", [-1000, 1000])
def test_content_of_the_wrong_length_is_not_kept(load, hub, length):
    """Longer or shorter than was announced: an error, and the next load is right."""
    content = FILES[WEIGHTS]
    hub.lies[WEIGHTS] = content[:length] if length < 0 else content + bytes(length)
    found, message = load()
    assert found == "ConnectionError" and WEIGHTS in message
    hub.lies.clear()
    assert load() == ANSWER


def test_without_a_network_what_was_fetched_still_loads(load, hub):
    """And what was not is an error that says so, at once."""
    found, message = load(HF_HUB_OFFLINE="1", KAGGLE_ENDPOINT="http://127.0.0.1:1")
    assert found == "ConnectionError" and PRESETS[load.hub] in message
    assert load() == ANSWER
    count = len(hub.sent)
    hub.shutdown()
    hub.server_close()
    for environment in (dict(), dict(HF_HUB_OFFLINE="1")):
        assert load(**environment) == ANSWER
    assert len(hub.sent) == count


def test_a_model_without_a_tokenizer_loads(load, hub):
    """That a file is missing is known from the hub, and then from the cache: no error."""
    for name in ("preprocessor.json", "assets/tokenizer/vocabulary.spm"):
        del hub.files[name]
    assert load() == ("loaded", "no tokenizer")
    if load.hub == "hf":  # Kaggle's client does not remember what is missing
        assert load(HF_HUB_OFFLINE="1") == ("loaded", "no tokenizer")


@pytest.mark.parametrize("what", ["summary", "causal_lm", "tokenizer"])
def test_weights_that_are_not_needed_are_not_asked_for(load, hub, what):
    """And are fetched when they are, the rest being there."""
    assert load(what) == ("loaded", what)
    asked = {name for _, name in hub.asked}
    assert "config.json" in asked and not any(name.startswith("model") for name in asked)
    if load.hub == "hf":
        found, message = load(HF_HUB_OFFLINE="1")
        assert found == "ConnectionError" and WEIGHTS in message
    assert load() == ANSWER
    assert [name for name, _ in hub.sent].count("config.json") == 1


@only_hugging_face
@pytest.mark.parametrize("revision", ["v1", "refs/pr/7", OTHER_COMMIT])
def test_a_revision_is_the_one_that_is_loaded(load, hub, revision):
    """A tag, a branch with slashes, a commit; `main` is another."""
    hub.commits[OTHER_COMMIT] = {name: FILES[name] for name in ("config.json", WEIGHTS)}
    hub.revisions.update({"v1": [OTHER_COMMIT], "refs/pr/7": [OTHER_COMMIT]})
    for environment in (dict(), dict(HF_HUB_OFFLINE="1")):
        assert load(revision=f"@{revision}", **environment) == ("loaded", "no tokenizer")
    assert {commit for commit, _ in hub.asked} == {OTHER_COMMIT}
    assert load() == ANSWER


@only_hugging_face
@pytest.mark.parametrize("revision", ["v2", "f" * 40])
def test_a_missing_revision_is_an_error_that_says_so(load, hub, revision):
    found, message = load(revision=f"@{revision}")
    assert found == "FileNotFoundError" and f"tiny-phi@{revision}" in message
    assert "check the name, and the revision" in message and "Revision Not Found" in message
    assert hub.asked == []


@only_hugging_face
def test_all_files_are_of_one_commit(load, hub):
    """A branch that moves on while it is loaded is read as it was."""
    hub.commits[OTHER_COMMIT] = {**FILES, WEIGHTS: b"of another architecture"}
    hub.revisions["main"] = [COMMIT, OTHER_COMMIT]
    assert load() == ANSWER
    assert {commit for commit, _ in hub.asked} == {COMMIT}
    assert load()[0] == "ValueError"  # what `main` is by now


HUGGING_FACE = {
    "config.json": json.dumps({
        "model_type": "phi3", "vocab_size": 16, "num_hidden_layers": 1, "hidden_size": 8,
        "intermediate_size": 8, "num_attention_heads": 1,
    }).encode(),
    "model.safetensors.index.json": json.dumps({
        "weight_map": {"a": "model-00001-of-00002.safetensors",
                       "b": "model-00002-of-00002.safetensors"},
    }).encode(),
    **dict.fromkeys([
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "README.md",
        "consolidated.safetensors", "pytorch_model.bin", "modeling_phi3.py", "onnx/config.json",
        "onnx/model.safetensors", "checkpoint-5/tokenizer.json", "tokenizer.json/tokenizer.json",
    ], b"no tensors"),
}


@only_hugging_face
def test_of_a_hugging_face_repository_no_more_is_fetched_than_read(load, hub):
    """No pickles, no copies of the weights for other programs, no code, nothing of directories."""
    hub.commits[COMMIT] = HUGGING_FACE
    found, message = load()
    assert found == "ValueError" and "model-00001-of-00002.safetensors cannot be read" in message
    assert sorted({name for _, name in hub.asked}) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    hub.commits[OTHER_COMMIT] = HUGGING_FACE | {"model.safetensors": b"no tensors"}
    hub.revisions["single"] = [OTHER_COMMIT]
    found, message = load(revision="@single")
    assert found == "ValueError" and "model.safetensors cannot be read" in message
    assert sorted(name for commit, name in hub.asked if commit == OTHER_COMMIT) == [
        "config.json", "model.safetensors", "model.safetensors.index.json",
    ]


@only_hugging_face
@pytest.mark.parametrize("name", ["*", "pytorch_model.[a-z]??", "..", "onnx/model.safetensors"])
def test_an_index_cannot_ask_for_more(load, hub, name):
    """Its names are names of files beside it, and no patterns."""
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.commits[COMMIT] = HUGGING_FACE | {"model.safetensors.index.json": index}
    found, message = load()
    assert found in ("FileNotFoundError", "ValueError") and repr(name) in message
    assert {name for _, name in hub.asked} == {"config.json", "model.safetensors.index.json"}
