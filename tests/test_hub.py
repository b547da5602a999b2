"""Models and data to a Hub and back, through huggingface_hub's own client and a small server that speaks its API."""

import subprocess
import sys

import pytest

from egom2p.hub import model_card
from tests.conftest import ROOT, run_cli
from tests.training.test_training import curve
from tests.zygote import Zygote


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(where commands start that know our server, its folder, its clients' home)."""
    folder = tmp_path_factory.mktemp("hub")
    process = subprocess.Popen([sys.executable, "-m", "tests.hub_server", "0", str(folder / "server")], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    port = process.stdout.readline().strip()
    # The client reads its address when it is imported, so these commands are forks of a process that read ours.
    zygote = Zygote(folder, HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HOME=str(folder / "home"), HF_TOKEN="good",
                    HF_HUB_DISABLE_XET="1")
    yield zygote, folder / "server", folder / "home"
    zygote.close()
    process.kill()


def command(hub, *words, code=0, token="good", **more):
    """What `egom2p WORDS` prints, in a process of its own."""
    done = hub[0].start(*words, HF_TOKEN=token, **more)
    printed = done.communicate(timeout=200)[0]
    assert done.returncode == code, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def pushed(hub, finished):
    printed = command(hub, "push", finished[0] / "model", "me/walker", "--licence", "apache-2.0")
    assert "me/walker" in printed
    return hub


@pytest.mark.slow
def test_a_pushed_model_decodes_on_the_other_side(pushed, finished, tmp_path):
    """Tokenizers come along; the same predictions as from the run; then without any network, from the cache."""
    folder = pushed[1] / "models/me/walker"
    assert (folder / "tokenizers/cam/config.json").is_file()
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    words = ("--inputs", finished[2], "--targets", "cam,gaze", "--out")
    offline = Zygote(tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(pushed[2]))
    for number, hub in enumerate((pushed, [offline])):
        command(hub, "generate", "me/walker", *words, tmp_path / str(number))
    offline.close()
    run_cli("generate", finished[0] / "model", *words, tmp_path / "own")
    for name in ("cam.npy", "gaze.npy"):
        assert len({(tmp_path / n / "walk" / name).read_bytes() for n in ("0", "1", "own")}) == 1


@pytest.mark.slow
def test_revisions_are_pinned_and_unknown_ones_refused(pushed, finished, tmp_path):
    words = ("features", "--clips", finished[0] / "clips/test/*.tar", "--out")
    command(pushed, words[0], "me/walker@main", *words[1:], tmp_path / "a")
    printed = command(pushed, words[0], "me/walker@v9", *words[1:], tmp_path / "b", code=2)
    assert "has no revision 'v9'" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("repo", "words"), [("me/nothing", "neither a folder here nor a Hub repository that you can"),
                                             ("me/private-one", "or it is private: `hf auth login`"),
                                             ("me/gated-one", "is gated: accept its conditions")])
def test_what_cannot_be_had_is_one_line(pushed, repo, words, tmp_path):
    if repo != "me/nothing":
        (pushed[1] / "models" / repo).mkdir(parents=True, exist_ok=True)
        (pushed[1] / "models" / repo / "config.json").write_text("{}")
    printed = command(pushed, "generate", repo, "--inputs", "x.mp4", "--targets", "cam", "--out", tmp_path, code=2,
                      token="")
    assert words in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.slow
def test_without_a_token_nothing_is_pushed(hub, finished):
    printed = command(hub, "push", finished[0] / "model", "me/other", code=2, token="bad")
    unreachable = command(hub, "push", finished[0] / "model", "me/other", code=2, HF_ENDPOINT="http://127.0.0.1:9")
    assert "check the network" in unreachable and len(unreachable.strip().splitlines()) == 1
    assert "me/other: the Hub does not take it" in printed and not (hub[1] / "models/me/other").exists()


@pytest.mark.slow
def test_token_shards_go_up_with_their_notes(hub, finished):
    command(hub, "push-data", f"{finished[0]}/tokens/[cam,gaze]/*/*.tar", "me/steps")
    folder = hub[1] / "datasets/me/steps"
    for name in ("cam/rooms/shard-000000.tar", "gaze/walks/encode.json", "cam/held_out/index.json"):
        assert (folder / name).read_bytes() == (finished[0] / "tokens" / name).read_bytes()
    assert "hf://datasets/me/steps" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_nothing_private_goes_into_the_open_and_nothing_old_stays(hub, finished, tmp_path):
    """A repository that is there already keeps its visibility, whatever is asked, and its files."""
    tokens = finished[0] / "tokens"
    command(hub, "push-data", f"{tokens}/cam/rooms/*.tar", "me/one")
    folder = hub[1] / "datasets/me/one"
    assert (folder / "cam/rooms/shard-000000.tar").exists()  # ROOT/MODALITY/DATASET, as data.root reads them
    printed = command(hub, "push-data", f"{tokens}/gaze/rooms/*.tar", "me/one", "--private", code=2)
    assert "there already and public" in printed and not (folder / "gaze").exists()
    (folder / "cam/rooms/shard-000009.tar").write_bytes(b"of another tokenizer")
    before = (folder / "cam/rooms/encode.json").read_bytes()
    printed = command(hub, "push-data", f"{tokens}/cam/rooms/*.tar", "me/one", code=2)
    assert "1 tars of an earlier upload" in printed and "shard-000009.tar" in printed
    assert (folder / "cam/rooms/encode.json").read_bytes() == before
    command(hub, "push-data", f"{tokens}/gaze/rooms/*.tar", "me/one")  # beside it


@pytest.mark.slow
def test_training_and_features_straight_from_the_hub(hub, finished, tmp_path):
    """`hf://` for token shards and for clips: what is trained and made is that of the local ones, to the last digit."""
    command(hub, "push-data", f"{finished[0]}/tokens/*/*/*.tar", "me/tokens")
    command(hub, "push-data", f"{finished[0]}/clips/test/*.tar", "me/clips")
    assert "data: {clips: \"hf://datasets/me/clips/*.tar\"}" in (hub[1] / "datasets/me/clips/README.md").read_text()
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    config = finished[0] / "model/config.yaml"
    for name, root in (("hub", "hf://datasets/me/tokens"), ("disk", finished[0] / "tokens")):
        command(hub, "train", config, f"data.root={root}", f"run.dir={tmp_path / name}", "train.steps=3",
                "eval.every=0", "train.threads=1", **cache)
    assert curve(tmp_path / "hub") == curve(tmp_path / "disk")
    clips = {"hub": "hf://datasets/me/clips/*.tar", "disk": f"{finished[0]}/clips/test/*.tar"}
    for name, pattern in clips.items():
        command(hub, "features", finished[0] / "model", "--clips", pattern, "--out",
                tmp_path / f"features-{name}", **cache)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / f"features-{n}").glob("*.safetensors")} for n in clips)
    assert ours == theirs and ours
    printed = command(hub, "features", finished[0] / "model", "--clips", "hf://datasets/me/clips/none-*.tar", "--out",
                      tmp_path / "none", code=2, **cache)
    assert "no tar at hf://datasets/me/clips/none-*.tar" in printed
    printed = command(hub, "features", finished[0] / "model", "--clips", "hf://datasets/me/no-such/*.tar", "--out",
                      tmp_path / "none", code=2, **cache)
    assert len(printed.strip().splitlines()) == 1 and "hf://datasets/me/no-such" in printed


def test_the_card_says_what_was_trained_and_measured(finished):
    card = model_card(str(finished[0] / "model"), "me/walker", "mit")
    for words in ("license: mit", "rooms (weight 0.56)", "12 steps of 4 samples", "| rgb2cam | ate_m |",
                  "| depth | depth |", 'from_pretrained("me/walker")', "without a scale"):
        assert words in card, words
