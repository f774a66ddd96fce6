// Credentials as AWS's SDK for JavaScript finds them.
import { fromInstanceMetadata } from "@aws-sdk/credential-providers";

const credentials = await fromInstanceMetadata()();
console.log("credentials", credentials.accessKeyId);
