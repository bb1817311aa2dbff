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

# Outside RUN: a trainer could take what is written there for its own.
check_place() {
	is_inside='import os, sys; run, out = map(os.path.realpath, sys.argv[1:]); sys.exit(out == run or out.startswith(run + os.sep))'
	python3 -c "$is_inside" "$run" "$out" || {
		say "OUT='$out' lies inside RUN='$run': choose another"
		exit 5
	}
}

# FILE BEGINNING: remove a result of an earlier call; a file that does not begin like one is somebody else's.
remove_old() {
	[ -e "$1" ] || [ -L "$1" ] || return 0
	if [ -L "$1" ] || [ "$(head -c "${#2}" "$1")" != "$2" ]; then
		say "$1 is not from an earlier call: move it away, or choose another OUT"
		exit 5
	fi
	rm -f -- "$1"
}

# NAME COMMAND...: run a farcast command and keep its JSON object, its result or its error, as OUT/NAME.json.
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

check_place
mkdir -p "$out"
for name in inspect fit predict; do
	remove_old "$out/$name.json" '{"schema_version"'
done
remove_old "$out/result.env" OUTCOME=
export FARCAST_FOR=resume FARCAST_DRY_RUN=false # whatever a farcast.toml says: the job resumes from what this writes

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
