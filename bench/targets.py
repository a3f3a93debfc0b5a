"""What was aimed at on an H200 and what was measured there, from the committed results: bench/render.py puts the table into
bench/README.md. bfloat16, heads of 64 channels, 12 of them; times of the GPU alone, each ratio within one run."""
import json
from pathlib import Path

BANDWIDTH, FLOPS = 4.8e12, 989e12  # bytes and 16-bit FLOPs a second, from the data sheet
WAITS = "loads: two programs a multiprocessor waited in 44 % of their cycles (Nsight Compute, before queries were loaded beside keys)"
SUMS = "sums over the rows are written in parts by 1,320 programs and added by a second launch; not profiled further"
LAUNCHES = "two launches, each of which lasts as long as the norm alone; one kernel of both has not been timed"
TOKENS = "what is read and written of the tokens, 0.08 of the whole, stays; PyTorch over compacted weights: 0.77, 0.53, 0.30"


def table(results: Path) -> str:
    """Markdown: a line a target."""
    rows = json.loads((results / "kernels_nvidia_h200.json").read_text())["rows"]
    jobs = {job["name"]: job["rows"] for job in json.loads((results / "card-nvidia-h200.json").read_text())["jobs"]}
    found = [*policy(jobs["policy_attention"]), *short([r for r in rows if r["operator"] == "short_attention"]),
             *select(jobs["select_tokens"]), *sliced([r for r in rows if r["operator"] == "sliced_mlp" and r["pass"] == "forward"]),
             *norm(jobs["add_norm"], [r for r in rows if r["operator"] == "add_norm"])]
    return "\n".join(["| operator | aim | measured | | what stands between |", "|-|-|-|-|-|",
                      *(f"| `{op}` | {aim} | {measured} | {'reached' if reached else 'missed'} | {'' if reached else why} |"
                        for op, aim, measured, reached, why in found)])


def policy(rows: list[dict]):
    row = next(r for r in rows if (r["B"], r["N"], r["H"], r["pass"]) == (128, 197, 12, "forward+backward"))
    ms, saved = row["gpu_ms"], row["saved_bytes"]
    ours, plain = min(ms["cuda"], ms["triton"]), min(t for name, t in ms.items() if name.startswith("unmasked"))
    yield ("policy_attention", "with its gradient, batch 128, 197 tokens: at most 1.15 times the best attention without a policy",
           f"{ours / plain:.2f}", ours <= 1.15 * plain, "")
    yield ("policy_attention", "there at least 3 times as fast as compiled, twice as FlexAttention",
           f"{ms['compiled'] / ours:.2f}, {ms['flex'] / ours:.1f}", ms["compiled"] >= 3 * ours and ms["flex"] >= 2 * ours, "")
    share = saved["cuda"] / saved["eager"]
    yield "policy_attention", "there at most 0.1 of plain PyTorch's saved activations", f"{share:.2f}", share <= 0.1, ""


def short(rows: list[dict]):
    rows = sorted(rows, key=lambda r: (r["N"], r["B"]))
    for N in dict.fromkeys(r["N"] for r in rows):
        ms = {r["B"]: r["gpu_ms"] for r in rows if r["N"] == N}
        gains = [min(t for name, t in of.items() if name != "triton") / of["triton"] for of in ms.values()]
        yield ("short_attention", f"{N} tokens, batch {', '.join(map(str, ms))}: at least 1.3 times the best library call (cuDNN)",
               ", ".join(f"{gain:.2f}" for gain in gains), min(gains) >= 1.3, WAITS)
    shares = {}
    for r in (r for r in rows if r["B"] >= 128):
        numbers = r["B"] * r["N"] * 768  # of q, k, v and the output each
        shares[f"{r['N']} x {r['B']}"] = 1e3 * max(8 * numbers / BANDWIDTH, 4 * numbers * r["N"] / FLOPS) / r["gpu_ms"]["triton"]
    yield ("short_attention", f"at least 0.6 of the card's limit (tokens x batch: {', '.join(shares)})",
           ", ".join(f"{share:.2f}" for share in shares.values()), min(shares.values()) >= 0.6, WAITS)


def select(rows: list[dict]):
    ms = next(r for r in rows if r["op"] == "select_tokens, norm" and r["B"] == 1)["gpu_ms"]
    yield ("select_tokens", "with the norm that follows, batch 1: at most 1.2 times that norm", f"{ms['cuda'] / ms['norm alone']:.2f}",
           ms["cuda"] <= 1.2 * ms["norm alone"], LAUNCHES)
    gain = ms["reference"] / ms["cuda"]
    yield "select_tokens", "there at least 5 times as fast as plain PyTorch", f"{gain:.1f}", gain >= 5, ""


def sliced(rows: list[dict]):
    of = {r["live"]: r["gpu_ms"] for r in rows if (r["rows"], r["C"], r["residual"]) == (25216, 768, False)}
    worst = max(ms["triton"] / ms["library on compacted"] for ms in of.values())
    yield ("sliced_mlp", "25,216 tokens, live 1, .75, .5, .25: at most 1.05 times PyTorch over compacted weights", f"{worst:.2f} at most",
           worst <= 1.05, "")
    shares = {live: of[live]["triton"] / of[1.0]["triton"] for live in (0.75, 0.5, 0.25)}
    yield ("sliced_mlp", "there proportional to what is alive within a tenth", ", ".join(f"{share:.2f}" for share in shares.values()),
           all(share <= 1.1 * live for live, share in shares.items()), TOKENS)


def norm(rows: list[dict], gradients: list[dict]):
    for C in (768, 384):
        row = next(r for r in rows if (r["B"], r["C"], r["pass"]) == (128, C, "forward"))
        share = row["share_of_copy_bandwidth"]["triton"]
        yield "add_norm", f"{C} channels, batch 128: at least 0.85 of a copy's bandwidth", f"{share:.2f}", share >= 0.85, ""
        ms = next(r for r in gradients if (r["B"], r["C"]) == (128, C))["gpu_ms"]
        share = row["bytes"] / ms["triton"] / (row["copied"] / ms["copy"])  # as many as forward: ds, dy, s and dx
        yield "add_norm", f"its gradient alone, {C} channels: as much", f"{share:.2f}", share >= 0.85, SUMS
