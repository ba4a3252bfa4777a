#!/usr/bin/env bash
# A stock upstream at the commit of patches/upstreams.toml, in upstream/NAME.
#
#   scripts/setup/upstream.sh [llava|tinyllava]
#
# From GitHub; where GitHub is out of reach, LLaVA from the package index: llava-torch, checked by hash, a little older
# than the commit. TinyLLaVA_Factory is on no package index. upstream/NAME.source says which it is; the report repeats it.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PWD/.venv/bin:$PATH

name=${1:-llava}
tree=upstream/$name
pin=$(python - "$name" <<'EOF'
import sys, tomllib
upstreams = tomllib.load(open("patches/upstreams.toml", "rb"))
if sys.argv[1] not in upstreams:
    print(f"upstream: no upstream {sys.argv[1]!r}: choose {', '.join(upstreams)}", file=sys.stderr)
    sys.exit(2)
pin = upstreams[sys.argv[1]]
package = pin.get("package", {"requirement": "-", "sha256": "-"})
print(pin["url"], pin["commit"], package["requirement"], package["sha256"], *pin["sparse"])
EOF
)
read -r url commit requirement sha256 folders <<<"$pin"

from_git() {
    # shellcheck disable=SC2086 # one word per folder
    git clone --quiet --filter=blob:none --no-checkout "$url" "$tree.partial" &&
        git -C "$tree.partial" sparse-checkout set $folders &&
        git -C "$tree.partial" checkout --quiet "$commit"
}

# The wheel has no scripts/: the two DeepSpeed configs that training names are written with upstream's settings.
from_index() {
    echo "$requirement --hash=sha256:$sha256" >"$tree.requirement" &&
        .uv/bin/uv pip install --quiet --no-deps --require-hashes --target "$tree.partial" -r "$tree.requirement" &&
        python - "$tree.partial" <<'EOF'
import json, pathlib, sys
scripts = pathlib.Path(sys.argv[1], "scripts")
scripts.mkdir()
for stage in (2, 3):
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
            "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
                 "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
                 "stage3_gather_16bit_weights_on_model_save": True}
    batch = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    config = {"bf16": {"enabled": "auto"}, **dict.fromkeys(batch, "auto"), "zero_optimization": zero}
    (scripts / f"zero{stage}.json").write_text(json.dumps(config, indent=4))
EOF
}

if [[ ! -s $tree.source ]]; then
    rm -rf "$tree" "$tree.partial"
    mkdir -p upstream
    if from_git; then
        source="$url@$commit"
    elif [[ $requirement == - ]]; then
        rm -rf "$tree.partial"
        echo "upstream: $url cannot be cloned from here, and no package index carries it" >&2
        exit 3
    else
        echo "upstream: no git clone of $url could be had: taking $requirement from the package index" >&2
        rm -rf "$tree.partial"
        from_index
        source="$requirement from the package index (sha256 $sha256), close to $commit"
    fi
    mv "$tree.partial" "$tree"
    echo "$source" >"$tree.source"
fi
echo "upstream: $(<"$tree.source")"
