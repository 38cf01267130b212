"""`vltrain train` and its kin on packs in a real S3 server (moto's), of which reads fail and bytes are flipped, as a
user starts them. In an environment of its own: pip install -e '.[test,bucket_test]', then pytest -m slow on this
file."""

import json
import random
import threading
from collections import Counter

import pytest

from tests.attacks.attack import run_vltrain
from tests.support.finished_run import finished_run

pytest.importorskip("s3fs", reason="install the extra `bucket_test`")
server = pytest.importorskip("moto.server", reason="install the extra `bucket_test`")
pytestmark = pytest.mark.slow
ADDRESS = "s3://packs-of-tests/far/packs"


class Faulty:
    """moto's server, of whose answers for shards a share is an error of the server or has a byte that is another."""

    def __init__(self, application) -> None:
        self.application, self.chance, self.share = application, random.Random(3), 0.0
        self.seen: Counter[str] = Counter()

    def __call__(self, environment, begin):
        self.seen[environment["REQUEST_METHOD"]] += 1
        if "list-type" in environment.get("QUERY_STRING", ""):
            self.seen["lists"] += 1
        reads = environment["REQUEST_METHOD"] == "GET" and environment["PATH_INFO"].endswith(".arrow")
        if reads and self.chance.random() < self.share:
            self.seen["failed"] += 1
            begin("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.application(environment, begin))
        if reads and body and self.chance.random() < self.share:
            self.seen["flipped"] += 1
            place = self.chance.randrange(len(body))
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        return [body]


@pytest.fixture(scope="module")
def bucket():
    """The server, with an empty bucket; the environment says where it is."""
    from werkzeug.serving import make_server

    faulty = Faulty(server.DomainDispatcherApplication(server.create_backend_app))
    running = make_server("127.0.0.1", 0, faulty, threaded=True)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    told = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{running.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "of-tests",
        "AWS_SECRET_ACCESS_KEY": "of-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        yield faulty
    running.shutdown()


@pytest.fixture(scope="module")
def places(bucket, tmp_path_factory):
    """A recipe with its packs in a folder and in the bucket, to which they went as the page says: the manifest last."""
    import s3fs

    made = finished_run(tmp_path_factory.mktemp("s3"))
    system = s3fs.S3FileSystem()
    system.mkdir("packs-of-tests")
    for path in sorted((made.root / "packs").iterdir(), key=lambda path: path.name == "manifest.json"):
        if path.name == "manifest.json":
            code, said = run_vltrain(["check", "data", ADDRESS], env={"XDG_CACHE_HOME": str(made.root)}, process=True)
            assert code == 2 and "not a folder of packed shards, or no such folder or bucket" in said, said
        system.put(str(path), f"{ADDRESS}/{path.name}")
    return made


def train(places, output: str, *more: str) -> list[float]:
    words = ["--recipe", places.recipe, "--output", places.root / output, "--eval.scorer", "null", *more]
    code, said = run_vltrain(["train", *words], process=True)
    assert code == 0, said[-3000:]
    return [json.loads(line)["loss"] for line in (places.root / output / "log.jsonl").read_text().splitlines()]


def test_a_run_on_a_bucket_is_the_run_on_the_folder_and_goes_on_from_it(places, bucket):
    near = train(places, "near")
    bucket.share, bucket.seen["lists"] = 0.1, 0
    far = train(places, "far", "--data.train_packs", ADDRESS, "--data.cache", str(places.root / "cache"))
    bucket.share = 0.0
    assert far == near and len(near) == 4 and bucket.seen["lists"] == 0
    run = [str(places.root / name) for name in ("far", "near")]
    code, said = run_vltrain(["check", "resume", *run, "--packs", ADDRESS])
    assert code == 0, said


@pytest.mark.parametrize(
    "words",
    [
        ["check", "data", ADDRESS],
        ["peek", ADDRESS, "--row", "1"],
        ["plan", "--recipe", "RECIPE", "--data.train_packs", ADDRESS, "--data.cache", "CACHE"],
    ],
    ids=lambda words: words[0],
)
def test_other_programs_take_the_address(words, places):
    told = {"RECIPE": str(places.recipe), "CACHE": str(places.root / "cache")}
    code, said = run_vltrain([told.get(word, word) for word in words], env={"XDG_CACHE_HOME": str(places.root)})
    assert code == 0, said
    assert "every byte as it was packed" in said or words[0] != "check"


@pytest.mark.parametrize(
    ("address", "variables", "told"),
    [
        ("s3://packs-of-tests/nothing", {}, "not a folder of packed shards, or no such folder or bucket"),
        ("s3://no-such-bucket-of-tests/packs", {}, "not a folder of packed shards, or no such folder or bucket"),
        (ADDRESS, {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no rights to read it"),
    ],
)
def test_a_bucket_without_packs_or_rights_is_refused_in_a_line(address, variables, told, places):
    variables = {**variables, "AWS_EC2_METADATA_DISABLED": "true", "XDG_CACHE_HOME": str(places.root)}
    code, said = run_vltrain(["check", "data", address], process=True, env=variables)
    assert code == 2 and told in said and "\n" not in said.strip(), said
