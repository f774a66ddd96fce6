#!/bin/sh
# before-install.sh: makes the user of the daemon, whose group the configuration belongs to.
# dpkg, rpm and install.sh run it before they put files in place.
set -e

if ! getent passwd imdsgate >/dev/null; then
	# The same as in sysusers.d, which is not there yet. systemd 219 does not read it from here.
	systemd-sysusers - 2>/dev/null <<-'END' || {
		u imdsgate - "Instance metadata gate" /nonexistent /usr/sbin/nologin
	END
		getent group imdsgate >/dev/null || groupadd --system imdsgate
		useradd --system --gid imdsgate --home-dir /nonexistent --no-create-home \
			--shell /usr/sbin/nologin --comment "Instance metadata gate" imdsgate
	}
fi
