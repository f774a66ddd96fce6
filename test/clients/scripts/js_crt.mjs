// Credentials as AWS's Common Runtime finds them. Its JavaScript shows no credentials: they are in what it signs.
import { auth, http } from "aws-crt";

const request = new http.HttpRequest("GET", "/", new http.HttpHeaders([["host", "example.com"]]));
const signed = await auth.aws_sign_request(request, {
  algorithm: auth.AwsSigningAlgorithm.SigV4,
  signature_type: auth.AwsSignatureType.HttpRequestViaHeaders,
  provider: auth.AwsCredentialsProvider.newDefault(),
  region: "us-east-1",
  service: "s3",
  date: new Date(),
});
console.log("credentials", /Credential=(\w+)/.exec(signed.headers.get("Authorization"))[1]);
