#!/usr/bin/env bash
# The first run on a GPU, in steps of at most 10 minutes: bench/first_run.sh [STEP...], all of them by default.
# Needs Python with numpy and torch + triton or CuPy; nothing of this project has to be installed. docs/first-run-on-a-gpu.md.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} results=${RESULTS:-bench/results}
mkdir -p "$results"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

# step NAME COMMAND...: what it prints goes to NAME.txt, how it ended to steps.jsonl. After 10 minutes it gets an
# interrupt, on which gpu-bn bench writes what it has measured.
step() {
  local name=$1 start=$SECONDS
  shift
  case " $wanted " in *" $name "*) ;; *) return ;; esac
  echo "== $name: $*"
  timeout --signal=INT --kill-after=30 600 "$@" 2>&1 | tee "$results/$name.txt"
  local code=${PIPESTATUS[0]}
  printf '{"step": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" $((SECONDS - start)) >> "$results/steps.jsonl"
}

all="info check tests bench tiers train"
wanted=${*:-$all}
for name in $wanted; do
  case " $all " in *" $name "*) ;; *) echo "unknown step $name, expected some of: $all" >&2; exit 2 ;; esac
done
gpu_bn=("$python" -m gpu_bn)
step info "${gpu_bn[@]}" info --json "$results/info.json"
step check "${gpu_bn[@]}" check --quick --json "$results/check.json"
case " $wanted " in *" tests "*) rm -f "$results/tests.json" ;; esac
report=$(mktemp)  # pytest's report, as XML; empty if the step is not wanted or was killed
step tests "$python" -m pytest -q -m gpu -p no:cacheprovider -o junit_family=xunit1 --junitxml "$report"
[ ! -s "$report" ] || "$python" bench/tests_json.py "$report" "$results/tests.json"
rm -f "$report"
step bench "${gpu_bn[@]}" bench --shapes few --out "$results/bench" --page "$results/bench/page.md"
step tiers "${gpu_bn[@]}" bench --shapes resnet50-32 --ops forward,backward --layout nchw,nhwc --peers 'torch cuDNN' \
  --tiers all --verify-model --out "$results/tiers" --page "$results/tiers/page.md"
step train "${gpu_bn[@]}" bench --shapes 32x64x56x56 --ops forward --train --eager --out "$results/train"
echo "Results: $results (steps.jsonl says how each step ended)"
