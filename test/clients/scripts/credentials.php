<?php
// Credentials as AsyncAws, the SDK for PHP that Debian has, finds them.
require "AsyncAws/Core/autoload.php";

$credentials = (new AsyncAws\Core\Credentials\InstanceProvider())->getCredentials(AsyncAws\Core\Configuration::create([]));
if ($credentials === null) {
    fwrite(STDERR, "InstanceProvider::getCredentials() is null\n");
    exit(1);
}
echo "credentials ", $credentials->getAccessKeyId(), "\n";
