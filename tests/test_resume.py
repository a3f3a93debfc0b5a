"""Checkpoints: a process that dies anywhere in a save leaves a whole one, and a run that goes on is the run uninterrupted."""
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from vitprune import BlockPruning, TokenPruning, prune, resume
from vitprune.digits import TensorLoader
from vitprune.resume import Checkpoints, write_metrics
from vitprune.step import Run
from vitprune.train import Stopped, TrainConfig, train

CONFIG = TrainConfig(epochs=5, batch_size=8, lr=3e-3, warmup_epochs=1, backbone_lr_scale=1.0, backbone_frozen_epochs=0,
                     train_embeddings=True, ema=0.8, mixup=0.8, ramp_tokens=True)


def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=3, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.1)


def student():
    dense = vit()
    torch.manual_seed(1)
    return prune(dense, TokenPruning(0.7, at=(1, 2)), BlockPruning(heads=0.5, hidden=0.5, method="movement", granularity=16))


def loaders(count=40):
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.45 * labels[:, None, None, None] + 0.1 * torch.rand(count, 1, 8, 8, generator=random)
    training = TensorLoader(images, labels, 8, mean=0.3, std=0.4, training=True)
    return training, replace(training, training=False)


def done_by(folder):
    return int(Checkpoints(folder).found()[0].name.removeprefix("step-"))


def learn(folder, stops=(), **kwargs):
    """A run that asks itself to stop after those steps, each time begun anew from nothing but the folder."""
    stops = list(stops)
    while True:
        model = student()

        def on_step(done, loss, left=stops):
            if left and done == left[0]:
                left.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            history = train(model, loaders(), CONFIG, vit(), checkpoints=Checkpoints(folder, **kwargs), on_step=on_step)
            return model, history
        except Stopped as stopped:
            if stopped.signal != signal.SIGTERM or f"SIGTERM after step {done_by(folder)} of 25" not in str(stopped):
                raise


def saved(folder, done=()):
    """A run with a checkpoint after each number of steps; the run."""
    run = Run(student(), CONFIG, 5, vit())
    batches = list(loaders()[0])
    for step in range(max(done)):
        run.step(step, *batches[step % 5])
        if step + 1 in done:
            Checkpoints(folder).save(run, step + 1)
    return run


def read(folder):
    """(steps done, weights) of what the folder gives to a new run."""
    run = Run(student(), CONFIG, 5, vit())
    return Checkpoints(folder).resume(run), run.model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_twenty_resumptions_are_bitwise_the_run_uninterrupted(tmp_path):
    model, history = learn(tmp_path / "whole")
    other, again = learn(tmp_path / "parts", stops=[n for n in range(1, 25) if n not in (5, 10, 15, 20)])
    assert again == history and len(history) == CONFIG.epochs
    assert same(model.state_dict(), other.state_dict())
    for name in ("weights.safetensors", "ema.safetensors"):
        assert same(*(load_file(tmp_path / kind / "step-00000025" / name) for kind in ("whole", "parts")))


def test_a_stop_while_evaluating_evaluates_again(tmp_path):
    """SIGTERM during the evaluation of the second epoch: its steps are not repeated, its record is not lost."""
    class Interrupting:
        def __init__(self, held_out):
            self.held_out, self.times = held_out, 0

        def __iter__(self):
            self.times += 1
            if self.times == 3:  # each epoch evaluates the model and its average
                os.kill(os.getpid(), signal.SIGTERM)
            return iter(self.held_out)

    _, history = learn(tmp_path / "whole")
    training, held_out = loaders()
    with pytest.raises(Stopped, match="after step 10 of 25"):
        train(student(), (training, Interrupting(held_out)), CONFIG, vit(), checkpoints=Checkpoints(tmp_path / "parts"))
    assert learn(tmp_path / "parts")[1] == history


def _die_in_child(action):
    """Run in a forked process; the number of the signal that killed it, or None where it ended well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return None


def test_killed_at_every_fsync_and_rename(tmp_path):
    """Before and after each of them: what is found is the checkpoint before or the new one, whole."""
    run = saved(tmp_path, done=(2,))
    before = read(tmp_path)
    batch = next(iter(loaders()[0]))
    run.step(2, *batch)
    deaths = 0
    for after in (False, True):
        for target in range(1000):
            def save(target=target, after=after):
                calls = 0

                def deadly(function):
                    def call(*args, **kwargs):
                        nonlocal calls
                        calls += 1
                        if calls > target and not after:
                            os.kill(os.getpid(), signal.SIGKILL)
                        function(*args, **kwargs)
                        if calls > target:
                            os.kill(os.getpid(), signal.SIGKILL)
                    return call

                for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
                    setattr(os, name, deadly(getattr(os, name)))
                Checkpoints(tmp_path, keep=1).save(run, 3)

            if _die_in_child(save) is None:
                break
            deaths += 1
            done, weights = read(tmp_path)
            assert done in (2, 3) and same(weights, before[1] if done == 2 else run.model.state_dict())
            for path in tmp_path.glob("step-00000003"):
                os.rename(path, tmp_path / "gone")
                subprocess.run(["rm", "-r", tmp_path / "gone"], check=True)
            if not Checkpoints(tmp_path).found():
                saved(tmp_path, done=(2,))
        assert read(tmp_path)[0] == 3
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
        subprocess.run(["rm", "-r", tmp_path / "step-00000003"], check=True)
        saved(tmp_path, done=(2,))
    assert deaths >= 16


def test_killed_within_a_write(tmp_path):
    """The kernel ends the process at the byte where a file passes a limit: half-written files are never taken for a checkpoint."""
    run = saved(tmp_path, done=(2,))
    _, before = read(tmp_path)
    run.step(2, *next(iter(loaders()[0])))
    largest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    deaths = 0
    for limit in sorted({0, 1, 7, 8, 100, 4096, *(largest * i // 16 for i in range(1, 16)), largest - 1}):
        def save(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            Checkpoints(tmp_path).save(run, 3)

        assert _die_in_child(save) == signal.SIGXFSZ
        deaths += 1
        done, weights = read(tmp_path)
        assert done == 2 and same(weights, before)
    assert deaths >= 20
    Checkpoints(tmp_path).save(run, 3)
    assert read(tmp_path)[0] == 3 and not list(tmp_path.glob(".*"))


def test_all_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    sync, rename = resume.sync, os.rename
    monkeypatch.setattr(resume, "sync", lambda path: (events.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", b.name)), rename(a, b)))
    saved(tmp_path, done=(1,))
    at = events.index(("rename", "step-00000001"))
    names = {"weights.safetensors", "ema.safetensors", "state.pt"}
    assert names | {".new-step-00000001"} == {name for kind, name in events[:at]} and events[at + 1] == ("sync", tmp_path.name)


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("size", [0, 1, 200, 0.5, -1])
def test_truncated_falls_back_to_the_one_before(tmp_path, name, size):
    saved(tmp_path, done=(1, 2))
    path = tmp_path / "step-00000002" / name
    whole = path.stat().st_size
    os.truncate(path, int(whole * size) if isinstance(size, float) else size if size >= 0 else whole + size)
    with pytest.warns(UserWarning, match=r"step-00000002 cannot be read .*; the one before is tried"):
        assert read(tmp_path)[0] == 1


def test_what_cannot_be_read_is_moved_away_and_written_anew(tmp_path):
    saved(tmp_path, done=(1, 2))
    os.truncate(tmp_path / "step-00000002" / "state.pt", 100)
    run, checkpoints = Run(student(), CONFIG, 5, vit()), Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="step-00000002 cannot be read"):
        assert checkpoints.resume(run) == 1
    run.step(1, *list(loaders()[0])[1])
    checkpoints.save(run, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path)[0] == 2
    assert [p.name.rsplit("-", 1)[0] for p in tmp_path.glob("damaged-*")] == ["damaged-step-00000002"]


def test_the_best_is_tried_too(tmp_path):
    learn(tmp_path, keep=1)
    (best,) = Checkpoints(tmp_path).found("best")
    os.truncate(tmp_path / "step-00000025" / "state.pt", 100)
    expected = int(best.name.removeprefix("best-"))
    if expected == 25:
        best.rename(best.with_name("best-00000020"))
    with pytest.warns(UserWarning, match="step-00000025 cannot be read"):
        assert read(tmp_path)[0] == expected


def test_a_full_disk_is_one_error_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    run = saved(tmp_path, done=(1,))

    def full(state, path):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")
    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(OSError, match="step-00000002 could not be written, the checkpoints before are as they were: No space left"):
        Checkpoints(tmp_path).save(run, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and read(tmp_path)[0] == 1


def test_other_data_are_refused(tmp_path):
    saved(tmp_path, done=(1,))
    with pytest.raises(ValueError, match="must give 5 batches an epoch, as when the run began, got 4"):
        Checkpoints(tmp_path).resume(Run(student(), CONFIG, 4, vit()))


def test_nothing_readable_is_one_clear_error(tmp_path):
    saved(tmp_path, done=(1, 2))
    for path in tmp_path.rglob("state.pt"):
        path.unlink()
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(RuntimeError, match="none of the 2 checkpoints"):
        read(tmp_path)


CALLS = [(os.system, "touch {}"), (exec, "open('{}', 'w')"), (eval, "open('{}', 'w')"), (os.mkdir, "{}"), (open, "{}", "w"),
         (subprocess.check_call, ["touch", "{}"]), (subprocess.Popen, ["touch", "{}"]), (os.popen, "touch {}"),
         (os.symlink, "/", "{}"), (print, "{}", False, None)]


class Evil:
    def __init__(self, call, marker):
        fill = lambda a: [fill(x) for x in a] if isinstance(a, list) else a.replace("{}", marker) if isinstance(a, str) else a  # noqa: E731
        self.call, self.args = call[0], tuple(fill(a) for a in call[1:])

    def __reduce__(self):
        return self.call, self.args


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    saved(folder, done=(1, 2))
    return folder


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_a_malicious_pickle_executes_nothing(two, tmp_path, call, protocol):
    marker = tmp_path / "executed"
    evil = {"done": 2, "run": Evil(call, str(marker))}
    path = two / "step-00000002" / "state.pt"
    if protocol % 2:
        torch.save(evil, path, pickle_protocol=max(protocol, 2))
    else:
        path.write_bytes(pickle.dumps(evil, protocol))
    with pytest.warns(UserWarning, match="step-00000002 cannot be read"):
        assert read(two)[0] == 1
    assert not marker.exists() and not marker.is_symlink()


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_last_and_the_best_are_kept(tmp_path, ema):
    """The best is the best of what will be saved: the moving average where there is one."""
    run = Run(student(), replace(CONFIG, ema=ema), 5, None)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for epoch, top1 in enumerate((50.0, 80.0, 60.0, 70.0)):
        run.history.append({"epoch": epoch, "top1": top1} if ema is None else {"epoch": epoch, "top1": 99.0 - top1, "ema_top1": top1})
        checkpoints.save(run, 5 * (epoch + 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-00000010", "step-00000015", "step-00000020"]


def test_never_refuses_and_a_finished_run_is_not_repeated(tmp_path):
    model, history = learn(tmp_path)
    with pytest.raises(FileExistsError, match="resume is 'never'"):
        learn(tmp_path, resume="never")
    again, records = learn(tmp_path)
    assert records == history and same(again.state_dict(), model.state_dict())


def test_metrics_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [{"epoch": 0}, {"epoch": 1}])
    write_metrics(path, [{"epoch": 0}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"epoch": 0}]


def test_sigterm_saves_and_the_same_command_continues(tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "vitprune", "train", "--model", "vit_tiny_patch16_224", "--output", str(output), "--device", "cpu",
               "--model_args", json.dumps(dict(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=2)),
               "--tokens", json.dumps(dict(keep=0.7, at=[1])), "--train.epochs", "40", "--train.batch_size", "64"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    for _ in range(600):
        if list((output / "checkpoints").glob("step-*")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in errors and "the same command continues" in errors
    before = len((output / "metrics.jsonl").read_text().splitlines())
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    epochs = [json.loads(line)["epoch"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert 0 < before < 40 and epochs == list(range(40))
    assert f"epoch {before}/40" not in done.stderr and f"epoch {before + 1}/40" in done.stderr
    other = subprocess.run([*command, "--train.lr", "0.5"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert other.returncode == 2 and "train.lr must be 0.001, as when the run in" in other.stderr
