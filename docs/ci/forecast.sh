#!/bin/sh
# Fit a training run and forecast it, as one CI job.
#
#   forecast.sh RUN HORIZON [OUT]
#
#   RUN      folder with the run's checkpoints    (or RUN_DIR)
#   HORIZON  steps ahead, one number              (or HORIZON)
#   OUT      folder for the results, "forecast" if not given; outside RUN   (or OUT_DIR)
#
# Leaves in OUT: inspect.json, fit.json, predict.json, forecaster.safetensors, the forecast, and result.env with
#   OUTCOME=forecast and RESUME_FROM=<path>, or OUTCOME=keep-training.
# Prints the path to resume from on stdout, and nothing where training should simply go on.
#
# Exit code: 0 in both of these cases; farcast's own code for anything else, which should fail the job.
# Needs farcast and python3 on PATH. Any other option of farcast: its FARCAST_... variable.
set -eu

read_path='import json, os, sys; sys.stdout.buffer.write(os.fsencode(json.load(open(sys.argv[1], "rb"))["path"]))'
NO_FORECAST=10 # farcast's exit code for "no forecast better than the last checkpoint"

run=${1:-${RUN_DIR:-}}
horizon=${2:-${HORIZON:-}}
out=${3:-${OUT_DIR:-forecast}}

say() {
	printf 'forecast.sh: %s\n' "$*" >&2
}

usage() {
	say "expected RUN HORIZON [OUT], found RUN='$run' HORIZON='$horizon'"
	exit 2
}

# NAME COMMAND...: run a farcast command and keep its JSON object as OUT/NAME.json, if it got that far.
keep() {
	file=$out/$1.json
	shift
	code=0
	farcast "$@" --json >"$file" || code=$?
	[ -s "$file" ] || rm -f "$file"
	return "$code"
}

[ -n "$run" ] || usage
case $horizon in
'' | *[!0-9]*) usage ;;
esac

case $run in
-*) run=./$run ;; # a folder and no option, whatever it is called
esac
case $out in
-*) out=./$out ;;
esac

mkdir -p "$out"
rm -f "$out/inspect.json" "$out/fit.json" "$out/predict.json" "$out/result.env"

keep inspect inspect "$run"
keep fit fit "$run" --output "$out/forecaster.safetensors"
status=0
keep predict predict --forecaster "$out/forecaster.safetensors" --horizon "$horizon" --output "$out/" --overwrite || status=$?

case $status in
0)
	path=$(python3 -c "$read_path" "$out/predict.json")
	case $path in
	*[][:space:][:cntrl:]\'\"\`\$\\\;\&\|\<\>\(\)\{\}\*\?\[\#\!]*)
		say "the forecast's path holds what a shell could obey, so it stands in predict.json and not in result.env"
		exit 2
		;;
	esac
	printf 'OUTCOME=forecast\nRESUME_FROM=%s\n' "$path" >"$out/result.env"
	say "resume from $path"
	printf '%s\n' "$path"
	;;
"$NO_FORECAST")
	printf 'OUTCOME=keep-training\n' >"$out/result.env"
	say "no forecast: keep training from the run's own last checkpoint"
	;;
*)
	say "farcast predict failed with exit code $status"
	exit "$status"
	;;
esac
