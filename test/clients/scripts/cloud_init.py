# What cloud-init's EC2 datasource finds at a boot.
import logging
import sys
import tempfile

from cloudinit import helpers
from cloudinit.sources import DataSourceEc2

logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
with tempfile.TemporaryDirectory() as directory:
    paths = helpers.Paths({"cloud_dir": directory, "run_dir": directory})
    source = DataSourceEc2.DataSourceEc2({}, None, paths)
    found = source.get_data()
    print("found", found, source.cloud_name)
    if not found:
        sys.exit(1)
    print("instance-id", source.get_instance_id())
    print("meta-data", len(source.metadata), "keys")
    print("user-data", len(source.userdata_raw or b""), "bytes")
