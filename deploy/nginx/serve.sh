#!/bin/sh
# nginx in the gateway's place, for compose/coordinator.nginx.yaml and systemd/polyclinic-nginx.service.
# Usage: polyclinic-nginx HOME PORT [FOLDER]. FOLDER takes nginx.conf, its logs and temporary files.
#
# Two programs: the renderer, which writes nginx.conf again and tells nginx to reload when a site is
# enrolled or revoked, and nginx. When one ends, both do: better closed than open to a revoked site. So do
# both when the SuperLink is away for a minute: a container that shares the coordinator's network has to be
# started again when the coordinator's was.
set -eu
umask 077
home=$1
port=$2
folder=${3:-/tmp/polyclinic-nginx}
away_s=${POLYCLINIC_AWAY_S:-60}
log_bytes=104857600

# Is the SuperLink's port open? 0A is "listening"; the image has no tool that would say so in words.
superlink() {
	[ -s "$home/node/link.port" ] &&
		grep -q ":$(printf %04X "$(cat "$home/node/link.port")") 00000000:0000 0A " /proc/net/tcp
}

until superlink && [ -s "$home/gateway/sites.json" ]; do
	echo "polyclinic-nginx: waiting for the coordinator in $home" >&2
	sleep 5 &
	wait $!
done

mkdir -p "$folder"
rm -f "$folder/nginx.conf" "$folder/nginx.pid"
upstream=127.0.0.1:$(cat "$home/node/link.port")
python3 -P -m polyclinic.server.gateway_nginx --home "$home" --host 0.0.0.0 --port "$port" \
	--upstream "$upstream" --out "$folder" --watch &
renderer=$!
nginx=
stop() {
	[ -z "$nginx" ] || kill -QUIT "$nginx" 2>/dev/null || true
	kill "$renderer" 2>/dev/null || true
	wait
}
trap 'trap - EXIT; stop; exit 0' TERM INT
trap stop EXIT

until [ -s "$folder/nginx.conf" ]; do
	kill -0 "$renderer"
	sleep 0.2
done
nginx -t -q -e stderr -p "$folder" -c "$folder/nginx.conf"
nginx -e stderr -p "$folder" -c "$folder/nginx.conf" &
nginx=$!

away=0
while kill -0 "$nginx" && kill -0 "$renderer" && [ "$away" -lt "$away_s" ]; do
	if superlink; then away=0; else away=$((away + 1)); fi
	for log in access error; do
		if [ "$(stat -c %s "$folder/$log.log" 2>/dev/null || echo 0)" -gt "$log_bytes" ]; then
			mv "$folder/$log.log" "$folder/$log.log.1"
			kill -USR1 "$nginx"
		fi
	done
	sleep 1 &
	wait $!
done
echo "polyclinic-nginx: nginx or its renderer ended, or the SuperLink is away" >&2
exit 1
