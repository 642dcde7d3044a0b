"""`doctor`: each part told by itself, with the numbers that a start would come to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import pytest

from benchmarks.compile_check.models import QWEN3_30B_A3B
from jaxserve.cli import doctor
from jaxserve.config import Config, SchedulerConfig
from jaxserve.device.buckets import MAX_PROGRAMS
from jaxserve.engine.load import buckets_for
from jaxserve.engine.machine import model_options
from jaxserve.errors import ConfigError
from pallas_kernels import native
from tests.cli.conftest import Ended, Run
from tests.models.loading import ORACLE, config_of
from tests.text.test_sentence_piece import Files

LLAMA_3_8B = Path(__file__).parent.parent / "data" / "llama_3_8b.json"
EMBEDDINGS = Path(__file__).parent.parent / "data" / "embeddings"
PARTS = ["machine", "device", "kernels", "programs", "model"]


def told(ended: Ended) -> dict[str, dict[str, str]]:
    """What was said, by part and name."""
    parts: dict[str, dict[str, str]] = {}
    for line in ended.out.splitlines():
        if line.startswith("  "):
            name, _, value = line[2:].partition("  ")
            if name.startswith("problem: "):
                name, value = "problem", name.removeprefix("problem: ")
            parts[list(parts)[-1]][name] = value.strip()
        else:
            parts[line] = {}
    return parts


def with_tokenizer(case: str, directory: Path) -> Path:
    """A small model beside a tokenizer."""
    for name in ("config.json", "model.safetensors"):
        (directory / name).symlink_to(ORACLE / case / name)
    vocabulary = Files(directory / "vocabulary", prefix=True)
    (directory / "tokenizer.model").symlink_to(vocabulary.model)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer."""
    return with_tokenizer("qwen3", tmp_path_factory.mktemp("model"))


def test_a_model_that_fits(run: Run, model: Path) -> None:
    settings = ("cache.num_pages=33", "cache.page_size=256", "cache.dtype=bfloat16")
    words = [f"--set={setting}" for setting in (*settings, "weights.dtype=float32")]
    ended = run("doctor", "--model", model, *words)
    assert (ended.status, ended.err) == (0, "")
    parts = told(ended)
    assert list(parts) == PARTS
    assert "jax " in parts["machine"]["packages"] and str(jax.devices()[0]) in parts["device"]
    assert parts["kernels"]["weights"] == "float32"
    said, config = parts["model"], config_of("qwen3")
    layers = config["num_hidden_layers"]
    assert said["path"] == str(model)
    assert said["architecture"] == f"Qwen3ForCausalLM, {layers} layers"
    assert said["tokenizer"].startswith("420 tokens, ends at [2]")
    assert said["chat template"] == "none"
    num_pages, context = 1 + 33, config["max_position_embeddings"]  # page 0 holds nothing
    page_bytes = layers * 256 * 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    assert num_pages * page_bytes > 2**20
    assert said["cache, full"] == (
        f"{num_pages} pages of 256 tokens, {num_pages * page_bytes >> 20} MiB as bfloat16: "
        f"{33 * 256 / context:.1f} sequences of {context} tokens"
    )


def expert_bytes(ranks: int, devices: tuple[int, int] = (1, 1)) -> int:
    """Of slots of these ranks together: Mixtral's 2 layers of 8 experts of 3 matrices, 64 by 48."""
    return ranks * 2 * 8 // devices[0] * 3 * (64 + 48 // devices[1])


def test_slots_of_experts(run: Run, tmp_path: Path) -> None:
    """Their bytes are said, and are not there for the cache."""
    directory = with_tokenizer("mixtral", tmp_path)
    settings = ["lora.enabled=true", "lora.classes=512x16,1024x4", "weights.dtype=float32"]
    words = [f"--set={setting}" for setting in settings]
    without = told(run("doctor", "--model", directory, *words))["model"]
    assert "of experts" not in without["adapters"]
    ended = run("doctor", "--model", directory, *words, "--set=lora.experts=true")
    assert (ended.status, ended.err) == (0, "")
    said = told(ended)["model"]["adapters"]
    assert said.startswith("512x16,1024x4: ")
    assert said.endswith(
        f" of layers, {4 * expert_bytes(512 * 16 + 1024 * 4) >> 20} MiB of experts"
    )
    large = ["--set=lora.classes=32768x1024", "--set=lora.experts=true"]
    ended = run("doctor", "--model", directory, *words, *large)
    assert ended.status == 1
    mib = 4 * expert_bytes(32768 * 1024) >> 20
    problem = told(ended)["model"]["problem"]
    assert f"MiB of a device, {mib} of them for experts, and " in problem


def test_slots_of_experts_on_chips(run: Run) -> None:
    """Experts over 2 devices, one side of each matrix over 2 more, as bfloat16."""
    settings = ["lora.enabled=true", "lora.classes=1024x8", "lora.experts=true"]
    words = [f"--set={setting}" for setting in (*settings, "parallel.expert=2")]
    config = ORACLE / "mixtral" / "config.json"
    ended = run("doctor", "--model", config, "--topology", "v5e:2x2", *words)
    assert (ended.status, ended.err) == (0, "")
    mib = 2 * expert_bytes(1024 * 8, (2, 2)) / 2**20
    assert told(ended)["topology"]["adapters"].endswith(f", {mib:.0f} MiB of experts a device")


def test_chips_that_are_not_here(run: Run) -> None:
    """Llama-3-8B's shape, by hand: 16 devices share 32 heads, 8 KV heads are held twice."""
    ended = run("doctor", "--model", LLAMA_3_8B, "--topology", "v5e:4x4")
    assert (ended.status, ended.err) == (0, "")
    parts = told(ended)
    assert list(parts) == ["topology"]
    said = parts["topology"]
    assert said["chips"].startswith("v5e:4x4: 16 devices of 15.8 GiB, 0.80 TB/s")
    assert said["mesh"] == "1 data, 1 expert, 16 model"
    assert (said["attention"], said["layers"]) == ("tpu", "32, scanned")
    assert said["heads"] == "8 KV heads are held 2 times"
    d, f, v, layers = 4096, 14_336, 128_256, 32
    matrices = layers * (2 * d * d + 2 * d * 16 * 128 + 3 * d * f) + 2 * v * d
    norms = 4 * d * (2 * layers + 1)
    assert said["weights"] == f"{(2 * matrices // 16 + norms) / 2**20:.0f} MiB a device as bfloat16"
    # Half of the memory, which is less than 64 whole contexts would take.
    assert said["cache"].startswith("8064 MiB a device as bfloat16")
    # One page of 16 positions on a device: its KV head's keys and values in 32 layers.
    page_bytes = layers * 16 * 2 * 128 * 2
    left = 0.9 * (15.75 * 2**30 - (2 * matrices // 16 + norms))
    assert f"{int(left / page_bytes) * 16 // 8192} rows of 8192 positions" in ended.out
    assert " with 64 rows\n" in ended.out


def test_the_kernel_for_experts_on_chips_that_are_not_here(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B_A3B))
    words = ["doctor", "--model", path, "--set=weights.dtype=bfloat16", "--topology"]
    asked = "--set=kernels.experts=gpu"
    off = "--set=kernels.experts=xla"
    for settings, experts in (([], "gpu"), ([asked], "gpu"), ([off], "xla")):
        ended = run(*words, "h100:1", *settings)
        assert (ended.status, ended.err) == (0, "")
        assert told(ended)["topology"]["experts"] == experts
    for where, more, reason in (
        ("v5e:4x4", [], "the platform is tpu"),
        ("h100:1", ["--set=weights.quantization=int8"], "it reads no codes"),
        ("h100:4", ["--set=parallel.model=4"], "matrices are 2048 x 192"),
    ):
        ended = run(*words, where, asked, *more)
        assert ended.status == 1
        assert f"kernels.experts=gpu cannot run here: {reason}" in ended.out


def test_weights_that_do_not_fit_the_chips(run: Run) -> None:
    ended = run("doctor", "--model", LLAMA_3_8B, "--topology", "v5e", "--set=weights.dtype=float32")
    assert ended.status == 1
    assert "the weights need 30633 MiB of each device, which has 16128" in ended.out


def test_a_topology_that_is_none(run: Run) -> None:
    for wrong, said in (("x5", "no known chip: there are v5e"), ("v5e:0x2", "write v5e:4x4")):
        ended = run("doctor", "--topology", wrong)
        assert ended.status == 2 and said in ended.err


@pytest.mark.skipif(native.load().reason is not None, reason="no native kernels")
def test_pages_that_the_native_attention_does_not_read(run: Run, model: Path) -> None:
    settings = ("cache.num_pages=33", "cache.dtype=fp8", "weights.quantization=int8")
    ended = run("doctor", "--model", model, *(f"--set={setting}" for setting in settings))
    assert (ended.status, ended.err) == (0, "")
    parts = told(ended)
    assert parts["kernels"]["weights"] == "int8"
    assert parts["kernels"]["attention"] == "cpu"
    said = parts["model"]
    assert said["attention"].startswith("xla (cpu: pages are float8_e4m3fn, the kernel takes ")
    assert said["cache, full"].startswith("34 pages of 16 tokens, 0 MiB as float8_e4m3fn: ")


def test_the_programs_are_those_that_a_start_compiles(run: Run) -> None:
    ended = run("doctor", "--model", "/no/model", "--set", "scheduler.max_rows=4")
    config, platform = Config(scheduler=SchedulerConfig(max_rows=4)), jax.devices()[0].platform
    options = model_options(config.weights, config.kernels, platform)
    programs = buckets_for(config, options, platform).programs
    lines = [line for line in ended.out.splitlines() if " rows  " in line]
    assert len(lines) == len(programs)
    assert told(ended)["programs"]["compiled"].startswith(
        f"{len(programs)} of at most {MAX_PROGRAMS} "
    )
    for line, program in zip(lines, programs, strict=True):
        assert line.split()[0] == str(program.num_rows)
        assert f" {program.num_tokens} tokens, {program.decode_steps} decode step" in line
    axes = [
        {program.num_rows for program in programs},
        {program.num_tokens for program in programs},
        {program.decode_steps for program in programs},
        {program.prompt_logprobs for program in programs},
    ]
    assert f"would be {math.prod(map(len, axes))})" in ended.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "/no/model"], "there is no model at '/no/model'"),
        (["--set", "cache.memory_bytes=1000"], "the KV cache needs"),
        (["--set", "cache.memory_bytes=1000000000000000"], "that are free"),
        (["--set", "model.max_context=1000000"], "the model was made for"),
    ],
)
def test_a_problem_is_told_where_it_is(
    run: Run, model: Path, words: list[str], sentence: str
) -> None:
    ended = run("doctor", "--model", model, *words)
    assert (ended.status, ended.err) == (1, "")
    parts = told(ended)
    assert list(parts) == PARTS
    assert sentence in parts["model"]["problem"]
    assert all("problem" not in parts[part] for part in PARTS[:-1])


def test_a_part_that_fails_stops_no_other(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config) -> object:
        raise ConfigError("no such device")

    monkeypatch.setattr(doctor, "_device", fail)
    ended = run("doctor", "--model", model)
    assert ended.status == 1
    parts = told(ended)
    assert list(parts) == PARTS
    assert parts["device"] == {"problem": "no such device"}
    assert "tokenizer" in parts["model"]


def test_a_model_that_embeds(run: Run, model: Path) -> None:
    words = ["--set=cache.num_pages=33", f"--set=embeddings.model={EMBEDDINGS / 'bert'}"]
    ended = run("doctor", "--model", model, *words)
    parts = told(ended)
    assert list(parts) == [*PARTS, "embeddings"]
    assert parts["embeddings"]["architecture"] == "BertModel, 2 layers"
    count, _, names = parts["embeddings"]["compiled"].partition(": ")
    assert int(count) == len(names.split(", ")) <= 12 and "embed_t2048_l64" in names
    words.append("--set=embeddings.max_length=65")
    problem = told(run("doctor", "--model", model, *words))["embeddings"]["problem"]
    assert problem == "embeddings.max_length is 65, but the model was made for 64 tokens"
