"""The command line: JSON alone on stdout, a user's error in one line and status 2."""
import json
import subprocess
import sys

import pytest
import torch
from jsonargparse import ArgumentParser

import vitprune
from vitprune.cli import COMMANDS, main
from vitprune.run import RunConfig

SMALL = ["test_vit", "--at", "2", "3", "4", "--tokens", "0.7", "--score", "cls_attention"]
TRAIN = ["train", "--model", "test_vit", "--output", "run"]


def run(capsys, *argv) -> dict:
    assert main(list(argv)) == 0
    return json.loads(capsys.readouterr().out)


def test_flops(capsys):
    out = run(capsys, "flops", "deit_base_patch16_224", "--tokens", "0.7", "--schedule", "geometric", "--heads", "0.5", "--hidden", "0.5",
              "--json")
    assert (round(out["params"] / 1e6, 2), round(out["macs"] / 1e9, 3)) == (46.95, 6.015)
    assert out["macs_convention"].startswith("fvcore")
    dense = run(capsys, "flops", "deit_tiny_patch16_224", "--json")
    assert dense["params"] == 5_717_416


def test_lists_of_ratios_and_counts(capsys):
    ratios = run(capsys, "flops", *SMALL[:5], "--tokens", "0.7", "0.5", "0.3", "--json")
    counts = run(capsys, "flops", *SMALL[:5], "--tokens", "70", "50", "30", "--json")
    assert ratios["macs"] == counts["macs"]
    one = run(capsys, "flops", "test_vit", "--heads", *["0.5"] * 6, "--json")
    assert one["macs"] == run(capsys, "flops", "test_vit", "--heads", "0.5", "--json")["macs"]


def test_bench(capsys, tmp_path):
    out = run(capsys, "bench", *SMALL, "--device", "cpu", "--batch", "1", "2", "--min-time", "0",
              "--out", str(tmp_path / "o.json"), "--json")
    fields = {"batch", "dtype", "dense_ms", "pruned_ms", "speedup", "flops_ratio", "realised_gain", "baseline", "fastest", "pruned_engine"}
    assert [r["batch"] for r in out["rows"]] == [1, 2]
    assert all(fields <= r.keys() for r in out["rows"])
    assert json.loads((tmp_path / "o.json").read_text()) == out


def test_prune_save_export(capsys, tmp_path):
    folder, onnx = str(tmp_path / "saved"), tmp_path / "m.onnx"
    assert main(["prune", *SMALL, "--heads", "0.5", "--hidden", "0.5", "--output", folder]) == 0
    model = vitprune.load(folder)
    assert model.keep_counts == [70, 48, 34]
    assert {b.attn.num_heads for b in model.blocks} == {1}
    capsys.readouterr()
    assert run(capsys, "flops", folder, "--json")["params"] == sum(p.numel() for p in model.parameters())
    pytest.importorskip("onnxruntime")
    assert main(["export", folder, "--output", str(onnx)]) == 0
    assert onnx.stat().st_size > 10_000


def test_prune_a_checkpoint(tmp_path):
    import timm

    torch.manual_seed(5)
    model = timm.create_model("test_vit")
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    assert main(["prune", "test_vit", "--at", "2", "3", "4", "--tokens", "0.7", "--checkpoint", str(tmp_path / "w.pth"),
                 "--output", str(tmp_path / "a")]) == 0
    pruned = vitprune.load(tmp_path / "a")
    torch.save({"model": pruned.state_dict()}, tmp_path / "trained.pth")  # now with predictors
    assert main(["prune", "test_vit", "--at", "2", "3", "4", "--tokens", "0.7", "--checkpoint", str(tmp_path / "trained.pth"),
                 "--output", str(tmp_path / "b")]) == 0
    again = vitprune.load(tmp_path / "b").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in pruned.state_dict().items())
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("argv", "message"), [
    (["flops", "nosuch"], "model must be a timm model name or a folder"),
    (["flops", "test_vit", "--tokens", "1.7"], "TokenPruning: keep must be in (0, 1], got 1.7"),
    (["flops", "test_vit", "--tokens", "0.7"], "must be a block in 0..5, got 6"),
    (["flops", "test_vit", "--tokens", "many"], 'Parser key "tokens"'),
    (["flops", "test_vit", "--bogus"], "unrecognized arguments: --bogus"),
    (["flops"], "arguments are required: flops.model"),
    (["flops", "resnet18", "--heads", "0.5"], "prune: model must be a timm VisionTransformer"),
    (["bench", "test_vit", "--device", "cpu"], "tokens, heads or hidden must be given"),
    (["bench", *SMALL, "--batch", "x"], 'Parser key "batch"'),
    (["bench", *SMALL, "--rounds", "2", "--device", "cpu"], "rounds must be >= 5, got 2"),
    (["bench", *SMALL, "--threads", "0"], "threads must be >= 1, got 0"),
    (["prune", "test_vit", "--output", "/tmp/x"], "--tokens, --heads or --hidden must be given"),
    (["prune", "test_vit", "--heads", "0.5", "--checkpoint", "/nosuch.pth", "--output", "/tmp/x"], "/nosuch.pth"),
    (["eval", "test_vit", "--data", "/nosuch"], "source must be a folder"),
    (["eval", "test_vit", "--data", "digits", "--batch-size", "0"], "batch_size must be >= 1, got 0"),
    (["eval", "test_vit", "--data", "digits", "--device", "tpu"], "eval: device must be cpu or cuda, got 'tpu'"),
    (["bench", *SMALL, "--device", "cuda:99"], "bench: device must be one this machine has, got 'cuda:99'"),
    ([*TRAIN, "--device", "tpu"], "train: device must be cpu or cuda, got 'tpu'"),
    ([*TRAIN, "--device", "cpu"], "model must take the data's pictures [1, 8, 8] (data.source 'digits'), test_vit takes [3, 160, 160]"),
    ([*TRAIN, "--device", "cpu", "--model_args", '{"img_size": 8, "in_chans": 1, "patch_size": 2, "embed_dim": 33}'],
     "model and model_args must make a timm VisionTransformer"),
    ([*TRAIN, "--tokens.rate", "2"], "Parser key \"tokens\": Problem with given class_path 'vitprune.TokenPruning': Option 'rate' is not"),
    ([*TRAIN, "--blocks.heads", "2"], "error: BlockPruning: heads must be in [0, 1], got 2.0\n"),
    ([*TRAIN, "--train.epoch", "2"], "unrecognized arguments: --train.epoch 2"),
    ([*TRAIN, "--model", ".", "--pretrained", "true"], "RunConfig: pretrained must be off where model is a folder, got True"),
    ([*TRAIN, "--model", ".", "--model_args.depth", "9"], "RunConfig: model_args must be empty where model is a folder, got {'depth': 9}"),
    ([*TRAIN, "--teacher_args.depth", "9"], "RunConfig: teacher_args must be empty without a teacher's name, got {'depth': 9}"),
    ([*TRAIN, "--train.sched", "step"], "TrainConfig: sched must be one of ('cosine', 'tanh', 'poly'), got step"),
    ([*TRAIN[:-1], __file__], "RunConfig: output must be a folder, got"),
    (["train", "--config", __file__], "train: config must be YAML"),
    (["show", "/nosuch"], "folder must hold model.safetensors"),
    (["table1", "--data", "/nosuch"], "data and checkpoints must be given together"),
    (["nothing"], "invalid choice: 'nothing'"),
    ([], 'to be one of {train,'),
])
def test_user_errors(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)  # a run may have made its folder before it is refused
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitprune: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_counts_and_ratios_of_a_run(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    for text, keep in (("[3,2,1]", (3, 2, 1)), ("[0.7,0.5,0.25]", (0.7, 0.5, 0.25)), ("0.7", 0.7)):
        options = parser.parse_args(["--model", "test_vit", "--output", "o", f"--tokens.keep={text}"])
        got = parser.instantiate(options).tokens.keep
        assert repr(got) == repr(keep)  # 3, not 3.0


@pytest.mark.parametrize("name", COMMANDS)
def test_help(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert COMMANDS[name][0].split(";")[0].split()[0] in capsys.readouterr().out


def test_doctor(capsys):
    run(capsys, "doctor", "--json")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    done = subprocess.run(f"{sys.executable} -m vitprune flops test_vit | true; echo ${{PIPESTATUS[0]}}", shell=True,
                          executable="/bin/bash", capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "141\n"
    assert "pipe" not in done.stderr


def test_as_a_module(tmp_path):
    """Away from the checkout, which would be imported in place of what is installed."""
    done = subprocess.run([sys.executable, "-m", "vitprune", "flops", "nosuch"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
