# For bash: `. ./commands.sh` in this folder, once a terminal. Then polyclinic-client and polyclinic-server
# run in the container: inside the running service, or in a container of their own before it is started.
MAIL=/mail DATA=/data STUDIES=/studies

_polyclinic() {
	local role=$1 program=$2
	shift 2
	if docker compose ps --quiet --status running "$role" | grep -q .; then
		docker compose exec --env HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" "$role" "$program" "$@"
	else
		docker compose run --rm --env HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" "$role" "$@"
	fi
}

polyclinic-client() { _polyclinic hospital polyclinic-client "$@"; }
polyclinic-server() { _polyclinic coordinator polyclinic-server "$@"; }
