// The role as AWS's metadata client for JavaScript finds it; it asks for //latest/….
import { MetadataService } from "@aws-sdk/ec2-metadata-service";

console.log("role", await new MetadataService({}).request("/latest/meta-data/iam/security-credentials/", {}));
