"""What was aimed at on an H200 and what was measured there, from the committed results: bench/render.py puts the table into
bench/README.md. bfloat16, heads of 64 channels; times of the GPU alone, each ratio within one run."""
import json
from pathlib import Path

from bench.common import LIMITS

BANDWIDTH, FLOPS = LIMITS["H200"]
WAITS = "before queries were loaded beside keys, programs waited for loads in 44 % of their cycles (Nsight Compute); not profiled since"
LAUNCHES = "two launches; one kernel of both (`select_norm`) has not been timed"


def table(results: Path) -> str:
    """Markdown: a line a target; of those alone whose rows are there, since a card's file may have been cut."""
    files = [results / f"{name}.json" for name in ("kernels_nvidia_h200", "card-nvidia-h200")]
    kernels, card = (json.loads(file.read_text()) if file.exists() else {} for file in files)
    rows = {name: [r for r in kernels.get("rows", ()) if r["operator"] == name] for name in ("short_attention", "sliced_mlp", "add_norm")}
    jobs = {job["name"]: job["rows"] for job in card.get("jobs", ())}
    found = [*policy(jobs.get("policy_attention", [])), *short(rows["short_attention"]), *select(jobs),
             *sliced([r for r in rows["sliced_mlp"] if r["pass"] == "forward"]), *norm(jobs.get("add_norm", []), rows["add_norm"])]
    return "\n".join(["| operator | aim | measured | | what stands between |", "|-|-|-|-|-|",
                      *(f"| `{op}` | {aim} | {measured} | {'reached' if reached else 'missed'} | {'' if reached else why} |"
                        for op, aim, measured, reached, why in found)])


def first(rows: list[dict], **facts) -> list[dict]:
    """The first row with those entries, or none."""
    return [r for r in rows if all(r.get(name) == value for name, value in facts.items())][:1]


def policy(rows: list[dict]):
    for row in first(rows, **{"B": 128, "N": 197, "H": 12, "pass": "forward+backward"}):
        ms, saved = row["gpu_ms"], row["saved_bytes"]
        ours, plain = min(ms["cuda"], ms["triton"]), min(t for name, t in ms.items() if name.startswith("unmasked"))
        yield ("policy_attention", "with its gradient, batch 128, 197 tokens, 12 heads: at most 1.15 times attention without a policy",
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
        yield ("short_attention", f"{N} tokens, 12 heads, batch {', '.join(map(str, ms))}: at least 1.3 times as fast as cuDNN's",
               ", ".join(f"{gain:.2f}" for gain in gains), min(gains) >= 1.3, WAITS)
    shares: dict[str, float] = {}
    further: dict[int, float] = {}  # by tokens: the share of what more pictures add
    for r in (r for r in rows if r["B"] >= 128):
        numbers = r["B"] * r["N"] * 768  # of q, k, v and the output each
        least = 1e3 * max(8 * numbers / BANDWIDTH, 4 * numbers * r["N"] / FLOPS)
        shares[f"{r['N']} x {r['B']}"] = least / r["gpu_ms"]["triton"]
        for few in first(rows, N=r["N"], B=128) if r["B"] == 512 else ():
            further[r["N"]] = least * (512 - 128) / 512 / (r["gpu_ms"]["triton"] - few["gpu_ms"]["triton"])
    if shares:
        why = further and f"what batch 512 adds to 128 moves at {words(further)} ({', '.join(map(str, further))} tokens)"
        yield ("short_attention", f"at least 0.6 of the card's limit (tokens x batch: {', '.join(shares)})",
               words(shares), min(shares.values()) >= 0.6, f"{why}; {WAITS}" if why else WAITS)


def select(jobs: dict[str, list[dict]]):
    """In one kernel or in two, whichever is faster; files from before there was one have the two among the selection's rows."""
    for row in first([*jobs.get("select_norm", ()), *(r for r in jobs.get("select_tokens", ()) if "norm" in r.get("op", ""))], B=1):
        ms = row["gpu_ms"]
        ours = min((t for name, t in ms.items() if name.split()[0] in ("triton", "cuda")), default=ms["reference"])
        why = "not profiled" if "select_norm" in jobs else LAUNCHES
        yield ("select_tokens", f"with the norm that follows, batch 1, {row['C']} channels: at most 1.2 times that norm",
               f"{ours / ms['norm alone']:.2f}", ours <= 1.2 * ms["norm alone"], why)
        gains = [ms[name] / ours for name in ("reference", "argsort, gather")]
        yield ("select_tokens", "there at least 5 times as fast as plain PyTorch: its definition, and DynamicViT's own argsort and gather",
               ", ".join(f"{gain:.1f}" for gain in gains), min(gains) >= 5, why)


def sliced(rows: list[dict]):
    of = {r["live"]: r["gpu_ms"] for r in rows if (r["rows"], r["C"], r["residual"]) == (25216, 768, False)}
    if not of:
        return
    ratios = [ms["triton"] / ms["library on compacted"] for ms in of.values()]
    yield ("sliced_mlp", "25,216 tokens, 768 channels, live 1, .75, .5, .25: at most 1.05 times PyTorch over compacted weights",
           f"{max(ratios):.2f} at most", max(ratios) <= 1.05, "")
    ours, library = ({live: of[live][name] / of[1.0][name] for live in (0.75, 0.5, 0.25)} for name in ("triton", "library on compacted"))
    yield ("sliced_mlp", "there proportional to what is alive within a tenth", words(ours),
           all(t <= 1.1 * live for live, t in ours.items()),
           f"live weights are gathered (4 to 6 us each), and tokens read and written; PyTorch over compacted weights: {words(library)}")


def words(shares: dict) -> str:
    return ", ".join(f"{share:.2f}" for share in shares.values())


def norm(rows: list[dict], gradients: list[dict]):
    for row in [row for C in (768, 384) for row in first(rows, **{"B": 128, "C": C, "pass": "forward"})]:
        share = row["share_of_copy_bandwidth"]["triton"]
        yield "add_norm", f"{row['C']} channels, batch 128: at least 0.85 of a copy's bandwidth", f"{share:.2f}", share >= 0.85, ""
        for ms in (r["gpu_ms"] for r in first(gradients, B=128, C=row["C"])):
            share = row["bytes"] / ms["triton"] / (row["copied"] / ms["copy"])  # as many as forward: ds, dy, s and dx
            yield "add_norm", f"its gradient alone, {row['C']} channels: as much", f"{share:.2f}", share >= 0.85, sums(gradients)


def sums(gradients: list[dict]) -> str:
    """What stands between the gradient and a copy."""
    why = "sums over the rows are written in parts by 1,320 programs and added by a second launch"
    for few, many in zip(first(gradients, B=32, C=768), first(gradients, B=128, C=768)):
        ours, copy = (many["gpu_ms"][name] - few["gpu_ms"][name] for name in ("triton", "copy"))
        share = 2 * copy / ours  # three are read and one is written
        why += (f"; what batch 128 adds to 32 (768 channels) moves at {share:.2f}, so that at batch 32 "
                f"{1e3 * (few['gpu_ms']['triton'] - ours / 3):.0f} us of {1e3 * few['gpu_ms']['triton']:.0f} are spent on something else, "
                f"of a copy {1e3 * (few['gpu_ms']['copy'] - copy / 3):.0f} of {1e3 * few['gpu_ms']['copy']:.0f}")
    return why
