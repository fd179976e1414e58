"""Hugging Face folders in and out: layouts, slices, errors, memory."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxalign.models import pretrained
from jaxalign.models.export import model_card, save
from jaxalign.models.pretrained import load, load_config, load_tokenizer
from jaxalign.models.transformer import Model
from jaxalign.sharding import MeshConfig, make_mesh, param_shardings
from jaxalign.types import Variables
from tests.models import tiny
from tests.together import free_port

ROOT = Path(__file__).resolve().parents[2]


def assert_equal(one, other):
    """The same tree, bit for bit."""
    flat, tree = jax.tree.flatten(one)
    other_flat, other_tree = jax.tree.flatten(other)
    assert tree == other_tree
    for a, b in zip(flat, other_flat, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def test_layout_of_llama(tmp_path):
    # hidden 64, 4 query heads and 2 key heads of 16, 3 layers in one segment of one block.
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["llama3"])
    _, variables = load(tmp_path)
    block = variables["params"]["segment_0"]["block_0"]
    query = content["model.layers.2.self_attn.q_proj.weight"]
    # Output row 1 * 16 + 5 of Hugging Face's matrix is dimension 5 of head 1; its columns are our input axis.
    np.testing.assert_array_equal(block["attention"]["query"]["kernel"][2, :, 1, 5], query[1 * 16 + 5, :])
    output = content["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(block["attention"]["output"]["kernel"][0, 3, 7, :], output[:, 3 * 16 + 7])
    down = content["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(block["mlp"]["down"]["kernel"][1], down.T)
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], content["lm_head.weight"].T)
    np.testing.assert_array_equal(variables["params"]["embed"]["embedding"], content["model.embed_tokens.weight"])


def test_layout_of_gpt2(tmp_path):
    # GPT-2 stores [in, out], and query, key and value side by side: head 2's dimension 3 of the key is 64 + 2 * 16 + 3.
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["gpt2"])
    _, variables = load(tmp_path)
    block = variables["params"]["segment_0"]["block_0"]
    key = content["transformer.h.1.attn.c_attn.weight"][:, 64 + 2 * 16 + 3]
    np.testing.assert_array_equal(block["attention"]["key"]["kernel"][1, :, 2, 3], key)
    bias = content["transformer.h.1.attn.c_attn.bias"][128 + 2 * 16 + 3]
    np.testing.assert_array_equal(block["attention"]["value"]["bias"][1, 2, 3], bias)
    np.testing.assert_array_equal(block["mlp"]["up"]["kernel"][2], content["transformer.h.2.mlp.c_fc.weight"])


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_round_trip(tmp_path, name):
    original = tiny.write_folder(tmp_path / "in", tiny.CONFIGS[name])
    model, variables = load(tmp_path / "in")
    save(tmp_path / "out", model, variables, None)
    again, same = load(tmp_path / "out")
    assert again.config == model.config
    assert_equal(variables, same)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: value.tobytes() for key, value in written.items()} == {
        key: value.tobytes() for key, value in original.items()
    }


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_in_shards(tmp_path, name, dtype):
    tiny.write_folder(tmp_path / "in", tiny.CONFIGS[name], dtype=dtype)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, variables = load(tmp_path / "in", mesh=mesh)
    save(tmp_path / "out", model, variables, None, dtype=dtype, max_shard_size=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        with safe_open(file, "np") as content:
            names = list(content.keys())
            sizes = [content.get_tensor(key).nbytes for key in names]
        assert sum(sizes) <= 40_000 or len(names) == 1
        assert all(index["weight_map"][key] == file.name for key in names)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert_equal(jax.device_get(variables), load(tmp_path / "out")[1])


@pytest.mark.parametrize("name", ["llama3", "qwen2-windows", "gpt2"])
def test_a_mesh_gets_the_same_numbers(tmp_path, name):
    tiny.write_folder(tmp_path, tiny.CONFIGS[name])
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, whole = load(tmp_path)
    _, sharded = load(tmp_path, mesh=mesh)
    assert_equal(whole, jax.device_get(sharded))
    wanted = param_shardings(mesh, whole["params"])
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded["params"]) == wanted
    assert not sharded["params"]["embed"]["embedding"].sharding.is_fully_replicated


def test_a_mesh_reads_slices_only(tmp_path, monkeypatch):
    tiny.write_folder(tmp_path, tiny.CONFIGS["llama3"])
    reads = {}
    original = pretrained.Folder.read

    def spy(self, name, index):
        array = original(self, name, index)
        reads.setdefault(name, []).append(array.size / np.prod(self.shapes[name]))
        return array

    monkeypatch.setattr(pretrained.Folder, "read", spy)
    load(tmp_path, mesh=make_mesh(MeshConfig(data=2, fsdp=4, tensor=1)))
    for name, parts in reads.items():
        if name.endswith("norm.weight"):
            assert parts == [1.0]
        else:
            # A quarter at a time, and what the two replicas share is read once.
            assert parts == [0.25] * 4, name


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, wanted):
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["llama3"], dtype=stored)
    model, variables = load(tmp_path, param_dtype=wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(wanted)}
    up = variables["params"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
    expected = content["model.layers.1.mlp.up_proj.weight"].T.astype(
        ml_dtypes.bfloat16 if wanted != "float32" else "f4"
    )
    np.testing.assert_array_equal(np.asarray(up[1], np.float32), expected.astype(np.float32))
    assert jax.eval_shape(model.init, jax.random.key(0)) == jax.eval_shape(lambda: variables)


def test_base_model_names_and_buffers(tmp_path, caplog):
    # The Hub's gpt2 is a base model: no `transformer.` before its names, and the causal masks are stored.
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["gpt2"])
    _, expected = load(tmp_path)
    bare = {name.removeprefix("transformer."): array for name, array in content.items()}
    save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, "jaxalign"):
        _, variables = load(tmp_path)
    assert_equal(expected, variables)
    assert not caplog.records


def test_unused_tensors_are_named(tmp_path, caplog):
    content = tiny.write_folder(tmp_path, tiny.CONFIGS["llama3.1"])
    tied = {"lm_head.weight": content["model.embed_tokens.weight"]}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    save_file(content | tied | old, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, "jaxalign"):
        load(tmp_path)
        assert not caplog.records
        save_file(content | {"score.weight": np.ones((1, 64), np.float32)}, tmp_path / "model.safetensors")
        load(tmp_path)
    assert "among them score.weight" in caplog.text and "model.safetensors" in caplog.text


def test_end_tokens_are_those_of_generation(tmp_path):
    tiny.write_folder(tmp_path, tiny.CONFIGS["llama2"])
    assert load_config(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6}))
    assert load_config(tmp_path).eos_ids == (2, 5)


class TestErrors:
    @pytest.fixture
    def folder(self, tmp_path):
        self.content = tiny.write_folder(tmp_path, tiny.CONFIGS["llama3"])
        return tmp_path

    def config(self, folder, **changes):
        (folder / "config.json").write_text(json.dumps(tiny.CONFIGS["llama3"] | changes))

    def test_missing_tensor(self, folder):
        del self.content["model.layers.1.mlp.up_proj.weight"]
        save_file(self.content, folder / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"
        ):
            load(folder)

    def test_untied_head_missing(self, folder):
        del self.content["lm_head.weight"]
        save_file(self.content, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
            load(folder)

    def test_wrong_shape(self, folder):
        self.config(folder, intermediate_size=97)
        with pytest.raises(
            ValueError, match=r"model\.safetensors: tensor .*mlp.* has shape \[96, 64\].*asks for \[97, 64\]"
        ):
            load(folder)

    def test_unknown_family(self, folder):
        self.config(folder, model_type="lama")
        with pytest.raises(ValueError, match=rf"{folder}: .*'lama'.*nearest by name is 'llama'; known: llama"):
            load(folder)

    def test_unsupported_setting(self, folder):
        self.config(folder, rope_parameters={"rope_type": "yarn", "factor": 4.0})
        with pytest.raises(ValueError, match="yarn"):
            load(folder)

    def test_quantised(self, folder):
        self.config(folder, quantization_config={"quant_method": "gptq"})
        with pytest.raises(ValueError, match="gptq"):
            load(folder)

    def test_truncated(self, folder):
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            load(folder)

    def test_missing_shard(self, folder):
        names = {name: "model-00001-of-00002.safetensors" for name in self.content}
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is missing"):
            load(folder)

    def test_torch_weights_only(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match=r"convert pytorch_model\.bin"):
            load(folder)

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load(folder)

    def test_broken_config(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            load(folder)

    def test_no_such_path(self, folder):
        for path in (folder / "nowhere", "./nowhere", "nowhere.gguf"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load(path)

    def test_a_file_that_is_no_gguf(self, folder):
        with pytest.raises(ValueError, match=r"not a \.gguf file"):
            load(folder / "model.safetensors")

    def test_hub_name_without_network(self):
        with pytest.raises(FileNotFoundError, match="download it elsewhere"):
            load("nobody/nothing-of-this-name")


class TestSave:
    @pytest.fixture
    def loaded(self, tmp_path) -> tuple[Model, Variables]:
        tiny.write_folder(tmp_path / "in", tiny.CONFIGS["llama3"])
        return load(tmp_path / "in")

    def test_existing_target(self, tmp_path, loaded):
        model, variables = loaded
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")
        with pytest.raises(FileExistsError, match="overwrite"):
            save(tmp_path / "out", model, variables, None)
        assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
        save(tmp_path / "out", model, variables, None, overwrite=True)
        assert not (tmp_path / "out" / "mine.txt").exists()
        assert_equal(load(tmp_path / "out")[1], variables)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]

    @pytest.mark.parametrize("existing", [False, True])
    def test_a_failure_leaves_nothing_half_done(self, tmp_path, loaded, existing):
        model, variables = loaded

        class Broken:
            def save_pretrained(self, folder):
                raise RuntimeError("disk full")

        if existing:
            save(tmp_path / "out", model, variables, None)
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(RuntimeError, match="disk full"):
            save(tmp_path / "out", model, variables, Broken(), overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        if existing:
            assert_equal(load(tmp_path / "out")[1], variables)

    def test_float16_overflow(self, tmp_path, loaded):
        model, variables = loaded
        params = variables["params"] | {"final_norm": {"scale": variables["params"]["final_norm"]["scale"] * 1e5}}
        with pytest.raises(ValueError, match=r"model\.norm\.weight.*float16"):
            save(tmp_path / "out", model, {"params": params}, None, dtype="float16")
        assert not (tmp_path / "out").exists()

    def test_configs_and_card(self, tmp_path, loaded):
        model, variables = loaded
        save(
            tmp_path / "out",
            model,
            variables,
            None,
            base_model="a/base",
            method="DPO",
            licence="apache-2.0",
            dtype="bfloat16",
        )
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["eos_token_id"] == [2, 3]
        assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
        generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3]}
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.startswith("---\nbase_model: a/base\nlicense: apache-2.0\n")
        assert "with DPO" in card and "- dpo\n" in card
        assert "None" not in model_card("plain")

    def test_a_card_of_ones_own(self, tmp_path, loaded):
        model, variables = loaded
        save(tmp_path / "out", model, variables, None, card="# Mine\n")
        assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"

    def test_tokenizer(self, tmp_path, smollm2, loaded):
        model, variables = loaded
        tokenizer = load_tokenizer(smollm2)
        save(tmp_path / "out", model, variables, tokenizer)
        again = load_tokenizer(tmp_path / "out")
        text = "<|im_start|>user\nCall 555-0123 at 12:45, naïve façade 東京 👍🏽<|im_end|>\n"
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.chat_template == tokenizer.chat_template
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 2)


PROCESS = """
import sys, jax
import numpy as np

process, port, source, target = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))

from jaxalign.models import pretrained
from jaxalign.models.export import save
from jaxalign.sharding import MeshConfig, make_mesh

read, original = [], pretrained.Folder.read

def spy(self, name, index):
    read.append(original(self, name, index))
    return read[-1]

pretrained.Folder.read = spy
model, variables = pretrained.load(source, mesh=make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)))
print(sum(array.size for array in read) / sum(leaf.size for leaf in jax.tree.leaves(variables)))
save(target, model, variables, None, max_shard_size=60_000)
"""


def test_two_processes(tmp_path):
    """Each of two processes reads its half, and together they write the whole."""
    content = tiny.write_folder(tmp_path / "in", tiny.CONFIGS["gpt2"])
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command, port = [sys.executable, "-c", PROCESS], free_port()
    started = [
        subprocess.Popen(
            [*command, str(process), str(port), str(tmp_path / "in"), str(tmp_path / "out")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for process in range(2)
    ]
    for process in started:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        assert 0.5 <= float(next(line for line in out.splitlines() if line[0].isdigit())) < 0.52
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == content.keys()
    assert all(np.array_equal(written[name], content[name]) for name in content)


MEASURE = """
import sys, jax
from jaxalign.models.pretrained import load
from jaxalign.models.transformer import Model
from jaxalign.sharding import MeshConfig, make_mesh

def high_water():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

load(sys.argv[1])  # a tiny model: what importing and tracing need is part of the base
mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)) if sys.argv[3] == "mesh" else None
before = high_water()
model, variables = load(sys.argv[2], mesh=mesh)
jax.block_until_ready(variables)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
print(size, high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(("stored", "place"), [("float32", "default"), ("bfloat16", "mesh")])
def test_memory_while_loading(tmp_path, stored, place):
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIGS["llama3"])
    sizes = {"vocab_size": 16_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    hf = tiny.CONFIGS["llama3"] | sizes | {"num_attention_heads": 8}
    kind = ml_dtypes.bfloat16 if stored == "bfloat16" else np.float32
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    config = pretrained.from_hf(hf)
    shapes = tiny.leaf_shapes(config)
    content = {
        tensor.name: np.ones(pretrained.file_shape(tensor, shapes[tensor.path][len(tensor.place) :]), kind)
        for tensor in pretrained.tensors(config)
    }
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    del content
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(folder), place],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    size, peak = map(int, out.stdout.split())
    assert size > 250e6
    assert peak < 1.25 * size
