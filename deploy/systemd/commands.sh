# For bash: `. ./commands.sh` in this folder, once a terminal. Then polyclinic-client and polyclinic-server
# run as the service's user, on the service's home.
MAIL=/srv/polyclinic/mail DATA=/srv/polyclinic/data STUDIES=/srv/polyclinic/studies

_polyclinic() {
	local program=$1
	shift
	sudo -u polyclinic env -C / HOME=/tmp POLYCLINIC_HOME=/var/lib/polyclinic HF_HOME=/var/lib/polyclinic/hub \
		HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" "/opt/polyclinic/bin/$program" "$@"
}

polyclinic-client() { _polyclinic polyclinic-client "$@"; }
polyclinic-server() { _polyclinic polyclinic-server "$@"; }
