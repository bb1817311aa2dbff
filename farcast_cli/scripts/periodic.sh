#!/bin/sh
# Train in rounds, with a leap between two of them wherever the run's own moves support one.
#
#   periodic.sh [--tidy] RUN ROUNDS -- COMMAND...
#
#   RUN       folder where COMMAND leaves the run's checkpoints
#   ROUNDS    how often to call COMMAND; the last round ends with its training
#   COMMAND   trains one stretch and stops at a checkpoint of its own; it may delete all the older ones
#   --tidy    when a leap is written, remove the one before last that this call wrote: two are on disk at a time
#
# After a leap was written, COMMAND is called with "--resume PATH" at its end and RESUME_FROM=PATH. In any other round
# nothing is added and RESUME_FROM is empty: go on from the run's own last checkpoint, or begin where there is none.
# RESUME_OPTION names another option than --resume.
#
# Exit code: 0 after the last round; COMMAND's or farcast's own code as soon as one fails. Nothing of the run is changed
# or deleted. Needs farcast on PATH. The forecasts and the memory of the run are in ./forecasts/RUN, their ledger is in ./forecasts;
# any option of farcast leap: its FARCAST_... variable, such as FARCAST_EVAL_CMD or FARCAST_LEAP_COUNTERS.
set -eu

NO_LEAP=10 # farcast's exit code for "no leap: go on from the last checkpoint"
option=${RESUME_OPTION:---resume}

say() {
	printf 'periodic.sh: %s\n' "$*" >&2
}

usage() {
	say "expected [--tidy] RUN ROUNDS -- COMMAND..."
	exit 2
}

# WHAT CODE: end with the code of what failed.
stop() {
	say "round $round: $1 failed with exit code $2"
	exit "$2"
}

# PATH: remove a forecast of an earlier round, if there was one and its place has not been taken since. What farcast
# wrote bears its mark, in the folder or beside the file.
remove() {
	if [ -z "$1" ] || [ "$1" = "$leap" ]; then
		return
	elif [ -f "$1/farcast.json" ]; then
		rm -r -- "$1"
	elif [ -f "$1.farcast.json" ]; then
		rm -- "$1" "$1.farcast.json"
	fi
}

export FARCAST_JSON=false FARCAST_DRY_RUN=false # whatever a farcast.toml says: a path is printed that is there
export FARCAST_OVERWRITE="${FARCAST_OVERWRITE:-true}" # a run that went back comes by the same step again

# Set `leap` to the checkpoint to resume from, or to nothing.
look_ahead() {
	leap=''
	code=0
	[ -d "$run" ] || {
		say "no folder '$run': the training command leaves its checkpoints elsewhere"
		exit 2
	}
	leap=$(farcast leap "$run") || code=$?
	case $code in
	0) ;;
	"$NO_LEAP") leap='' ;;
	*) stop "farcast leap" "$code" ;;
	esac
}

tidy=''
if [ "${1:-}" = --tidy ]; then
	tidy=yes
	shift
fi
[ $# -ge 4 ] && [ "$3" = -- ] || usage
run=$1
rounds=$2
shift 3
case $rounds in
'' | *[!0-9]* | 0*) usage ;;
esac

leap='' last='' before=''
round=1
while :; do
	say "round $round of $rounds: ${leap:-from the last checkpoint of the run itself}"
	code=0
	RESUME_FROM=$leap "$@" ${leap:+"$option" "$leap"} || code=$?
	[ "$code" -eq 0 ] || stop "the training command" "$code"
	[ "$round" -lt "$rounds" ] || break
	look_ahead
	if [ -n "$leap" ]; then
		[ -z "$tidy" ] || remove "$before"
		before=$last
		last=$leap
	fi
	round=$((round + 1))
done
