"""Steps and kernels compiled for chips that are not here, each run in a process of its own.

Some rows always, and of all others another part each day: `scripts/compile_check` does them all.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compile_check import targets
from benchmarks.compile_check.changed import patterns
from benchmarks.compile_check.check import Result
from benchmarks.compile_check.hlo import Collective, collectives, kernels
from benchmarks.compile_check.table import missing_steps, write_table

ROOT = Path(__file__).parents[2]
#: Parts that all rows are in; one is compiled a day.
PARTS = 100
#: Of the rows that the last day's commits concern, about so many are compiled.
MOST_CHANGED = 2


def compile_rows(*words: str) -> list[dict[str, Any]]:
    """The results of `compile_check` with these arguments, all of them as expected."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_check", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and results, done.stderr[-4000:]
    assert all(result["holds"] for result in results)
    return results


def needs(*platforms: str) -> Any:
    reasons = [reason for platform in platforms if (reason := targets.missing(platform))]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "nothing is missing")


@needs("tpu")
def test_a_step_on_tpus_updates_the_cache_in_place_and_reduces_twice_a_layer() -> None:
    (result,) = compile_rows("llama-3-8b/v5e:2x2/decode")
    assert result["attention"] == "tpu"
    assert result["cache_bytes"] > 8e9 and result["temp_bytes"] < 0.1e9
    own = 64 * 4096 * 2  # bytes of 64 rows of hidden states
    assert result["in_layer"] == [f"all-reduce {own}"] * 2
    large = [what for what in result["outside"] if int(what.split()[1]) >= own]
    logits = 64 * 128_256 * 4 // 4  # each device's part of the vocabulary, in float32
    assert set(large) == {f"all-reduce {own}", f"all-to-all {logits}"}


@needs("tpu")
def test_a_step_over_pages_of_codes_updates_them_in_place() -> None:
    (result,) = compile_rows("llama-3-8b-int8-fp8-cache/v5e:2x2/decode")
    assert result["attention"] == "tpu"
    assert result["cache_bytes"] > 8e9 and result["temp_bytes"] < 0.1e9
    # Weights of int8 too: what the devices exchange is bfloat16 all the same.
    assert result["in_layer"] == [f"all-reduce {64 * 4096 * 2}"] * 2


@needs("gpu")
@pytest.mark.in_turn("hopper")
def test_a_step_of_int4_weights_on_a_hopper_gpu_writes_no_weight_out() -> None:
    (result,) = compile_rows("llama-3-8b-int4/h100:1/decode")
    widened = 4096 * 28_672 * 2  # of one layer, gate and up in bfloat16
    assert result["weights_bytes"] < 5.5e9 and result["temp_bytes"] < 0.7 * widened


@needs("gpu")
@pytest.mark.in_turn("hopper")
def test_a_step_on_a_hopper_gpu_has_its_own_attention_and_copies_no_weights() -> None:
    (result,) = compile_rows("llama-3-8b/h100:1/decode")
    assert result["attention"] == "gpu"
    layer = result["weights_bytes"] / 40  # one of 32, beside the two tables
    assert result["cache_bytes"] > 40e9 and result["temp_bytes"] < layer / 2


@needs("tpu")
def test_what_tpus_copied_once_they_copy_no_more() -> None:
    """Gate and up of a layer are 117 MB; a run of the vocabulary padded to 128 was 25 MB."""
    one, two = compile_rows("llama-3-8b-int8/v5e:1x1/decode", "smollm2-135m/tpu7x:1x1x1/decode")
    assert one["temp_bytes"] < 0.2e9
    assert two["temp_bytes"] < 0.05e9


@needs("gpu")
@pytest.mark.in_turn("hopper")
def test_the_hopper_products_change_what_they_are_given_in_place() -> None:
    rows = compile_rows(
        "lora_matmul/qkv/decode/h100:1",
        "lora_matmul/smollm2-out/prefill/h100:1",
        "grouped_matmul/qwen3-30b-a3b-bfloat16/decode/h100:1",
        "grouped_matmul/mixtral-8x7b-int8/decode/h100:1",
    )
    assert [row["verdict"] for row in rows] == ["compiles"] * 3 + ["refused"]
    matrices = 3 * 4 * 128 * 2048 * 768 * 2
    assert rows[2]["argument_bytes"] > matrices and rows[2]["temp_bytes"] < matrices / 100


@needs("gpu")
def test_adapters_take_two_kernels_a_site_and_class_where_one_token_a_row_comes() -> None:
    """And one more, which adds up, for the class of rank 128; three for all in long steps."""
    sites = "qkv", "out", "gate_up", "down"
    names = [f"lora_matmul/{site}/decode/h100:1" for site in sites]
    rows = compile_rows(*names, "lora_matmul/gate_up/prefill/h100:1")
    found = {row["name"]: row["kernels"] for row in rows}
    assert found == dict.fromkeys(names, 2 + 2 + 3) | {"lora_matmul/gate_up/prefill/h100:1": 9}


@needs("tpu")
def test_what_does_not_fit_is_refused_with_its_bytes() -> None:
    rows = compile_rows("llama-3-8b/v5e:1x1", "llama-3-70b-int8/v5e:2x2")
    assert [row["verdict"] for row in rows] == ["refused"] * 4
    assert (
        "for one sequence of 8192 positions, and cache.memory_fraction=0.5 of 16128.0 MiB"
        in rows[0]["detail"]
    )
    assert rows[2]["weights_bytes"] > 16e9
    assert "the weights need " in rows[2]["detail"]


@pytest.mark.slow
@needs("tpu", "gpu")
def test_this_day_s_part_of_all_rows() -> None:
    day = datetime.date.today().toordinal()
    compile_rows("--part", f"{1 + day % PARTS}/{PARTS}")


@pytest.mark.slow
@needs("tpu", "gpu")
def test_some_of_the_rows_that_the_last_day_s_commits_concern() -> None:
    words = [sys.executable, "-m", "benchmarks.compile_check", "--list", "--changed", "24"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split() if name]
    if names:
        parts = max(1, len(names) // MOST_CHANGED)
        day = datetime.date.today().toordinal()
        compile_rows("--changed", "24", "--part", f"{1 + day % parts}/{parts}")


def test_files_that_changed_name_the_rows_that_compile_them() -> None:
    assert patterns(["docs/kernels.md", "jaxserve/http/app.py"]) == []
    assert patterns(["pallas_kernels/quant_matmul/xla.py"]) == ["quant_matmul/", "-int8", "-int4"]
    assert patterns(["pallas_kernels/kv_update/tpu.py", "jaxserve/models/llama.py"]) == [
        *("kv_update/", "/decode", "/prefill")
    ]


def test_exchanges_are_read_from_a_program_s_text() -> None:
    text = """
  %all-reduce.9 = bf16[64,4096]{1,0:T(8,128)(2,1)} all-reduce(%fusion.1), metadata={op_name="jit(step)/model/while/body/eval_jaxpr/jit(_run_layer)/layer/out"}
  %all-gather-start = (f32[8]{0}, f32[4,8]{1,0}) all-gather-start(%x), metadata={op_name="jit(step)/sampling"}
  %all-gather-done = f32[4,8]{1,0} all-gather-done(%all-gather-start)
  ROOT %all-to-all.1 = (pred[2,16]{1,0}, pred[2,16]{1,0}) all-to-all(%a, %b)
"""  # noqa: E501
    assert list(collectives(text)) == [
        Collective("all-reduce", True, 64 * 4096 * 2),
        Collective("all-gather", False, 4 * 8 * 4),
        Collective("all-to-all", False, 0),
    ]


def test_kernels_are_counted_in_a_program_s_text() -> None:
    """Those of the scope and of none, outside of the fusions' own instructions."""
    text = """
%fused_pad (p: s32[8]) -> s32[64] {
  ROOT %pad.1 = s32[64]{0} pad(%p, %c), metadata={op_name="jit(f)/lora_matmul/pad"}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  %sort.1 = (pred[8]{0}, s32[8]{0}) sort(%x, %y), metadata={op_name="jit(f)/argsort/sort"}
  %bitcast.1 = f32[2,4]{1,0} bitcast(%x)
  %call.1 = (f32[8]{0}, s8[4]{0}) custom-call(%x), metadata={op_name="jit(f)/lora_matmul/mpmd_map"}
  %sum.1 = f32[8]{0} fusion(%call.1), kind=kInput, metadata={op_name="jit(f)/lora_matmul/sum"}
  ROOT %copy.1 = f32[8]{0} copy(%sum.1)
}
"""
    assert kernels(text, "lora_matmul") == 3
    assert kernels(text, "argsort") == 2


def test_the_table_keeps_rows_that_were_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- compile_check -->\n<!-- /compile_check -->\nbelow\n")

    def compiled(name: str, temp_bytes: int) -> Result:
        return Result(name, "compiles", "compiles", attention="tpu", temp_bytes=temp_bytes)

    later, earlier = "llama-3-8b/v6e:1x1/decode", "smollm2-135m/v5e:1x1/prefill"
    write_table([compiled(later, 5_000_000), compiled("kv_update/x/v5e:1x1", 1)], page)
    write_table([compiled(earlier, 7_000_000)], page)
    assert missing_steps(page) >= {"llama-3-8b/v6e:1x1/prefill", "llama-3-8b/v6e:2x2/decode"}
    assert not missing_steps(page) & {later, earlier}
    write_table([compiled(later, 9_000_000)], page)
    assert page.read_text().splitlines()[4:-1] == [
        "|---|---|---|---|---|---|---|",
        "| smollm2-135m, prefill | v5e:1x1 | tpu | 0.00 | 0.00 | 7 | none |",
        "| llama-3-8b, decode | v6e:1x1 | tpu | 0.00 | 0.00 | 9 | none |",
        "",
        "<!-- /compile_check -->",
    ]
