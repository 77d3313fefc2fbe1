//! The SDK's client of one bucket: where, as whom, over which TLS, and how long it waits.
//!
//! Credentials: a file of the AWS tools' form if one is named, else the SDK's chain (environment, profiles, web identity,
//! container, instance metadata). They are looked for here once, so that their lack is said as such and not as a failed request.
//! No checksum headers but `Content-MD5`: the SDK's newer default is refused by many servers.

use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::{ProfileFileCredentialsProvider, ProfileFileRegionProvider};
use aws_config::provider_config::ProviderConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ProvideCredentials, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};

use super::fault::chain;
use crate::bucket::BucketError;
use crate::bucket::settings::S3Location;

/// Until a connection stands.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Without a byte of a body, in either direction.
const STALL_MAX: Duration = Duration::from_secs(10);
/// Until the chain has found credentials or has not; its last link asks an address that may not answer.
const CREDENTIALS_MAX: Duration = Duration::from_secs(20);
/// What servers that know no regions are asked with.
const REGION_DEFAULT: &str = "us-east-1";

pub(super) async fn client(location: &S3Location) -> Result<Client, BucketError> {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_MAX.min(location.timeout))
        // A whole try has a deadline of its own.
        .disable_read_timeout()
        .disable_operation_timeout()
        .disable_operation_attempt_timeout()
        .build();
    let shared = load(location).await?;
    check_credentials(location, &shared).await?;
    let named = location.endpoint.is_some() || shared.endpoint_url().is_some();
    let config = aws_sdk_s3::config::Builder::from(&shared)
        .region(shared.region().cloned().or(Some(Region::from_static(REGION_DEFAULT))))
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts)
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled().grace_period(STALL_MAX.min(location.timeout)).build(),
        )
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .force_path_style(location.path_style.unwrap_or(named))
        .build();
    Ok(Client::from_conf(config))
}

async fn load(location: &S3Location) -> Result<SdkConfig, BucketError> {
    let http = http(location)?;
    // Without a client of ours the SDK's providers look for one that is not built in, and panic.
    let region = region(location).await;
    let providers = ProviderConfig::without_region().with_http_client(http.clone()).with_region(region.clone());
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12()).http_client(http);
    if let Some(region) = region {
        loader = loader.region(region);
    }
    if let Some(endpoint) = &location.endpoint {
        loader = loader.endpoint_url(endpoint);
    }
    if let Some(profile) = &location.profile {
        loader = loader.profile_name(profile);
    }
    if let Some(file) = &location.credentials {
        // The SDK says only that a file has no keys, not that there is no file.
        std::fs::metadata(file).map_err(|error| missing(location, &error.to_string()))?;
        let files = EnvConfigFiles::builder().with_file(EnvConfigFileKind::Credentials, file).build();
        let mut provider = ProfileFileCredentialsProvider::builder().configure(&providers).profile_files(files);
        if let Some(profile) = &location.profile {
            provider = provider.profile_name(profile);
        }
        loader = loader.credentials_provider(provider.build());
    }
    Ok(loader.load().await)
}

/// The chain of the SDK ends at the instance metadata service; who names an endpoint is not on such an instance. `None` leaves
/// it to that chain.
async fn region(location: &S3Location) -> Option<Region> {
    if let Some(region) = &location.region {
        return Some(Region::new(region.clone()));
    }
    location.endpoint.as_ref()?;
    let chain = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::new());
    chain.or_else(REGION_DEFAULT).region().await
}

fn http(location: &S3Location) -> Result<SharedHttpClient, BucketError> {
    let builder = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring));
    let Some(file) = &location.ca else { return Ok(builder.build_https()) };
    let unusable = |why: String| BucketError::Url(format!("ca {}: {why}", file.display()));
    let pem = std::fs::read(file).map_err(|error| unusable(error.to_string()))?;
    // The client would panic at its first connection over what is no certificate.
    use rustls_pki_types::pem::PemObject;
    let mut certificates = rustls_pki_types::CertificateDer::pem_slice_iter(&pem).peekable();
    if certificates.peek().is_none() || certificates.any(|certificate| certificate.is_err()) {
        return Err(unusable("it holds no PEM certificates".into()));
    }
    let store = TrustStore::default().with_pem_certificate(pem);
    let context = TlsContext::builder().with_trust_store(store).build().map_err(|error| unusable(error.to_string()))?;
    Ok(builder.tls_context(context).build_https())
}

async fn check_credentials(location: &S3Location, shared: &SdkConfig) -> Result<(), BucketError> {
    let Some(provider) = shared.credentials_provider() else { return Err(missing(location, "there is no provider")) };
    match tokio::time::timeout(CREDENTIALS_MAX, provider.provide_credentials()).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(missing(location, &chain(&error.to_string(), &error))),
        Err(_) => Err(missing(location, &format!("nothing was found within {CREDENTIALS_MAX:?}"))),
    }
}

fn missing(location: &S3Location, why: &str) -> BucketError {
    BucketError::Credentials { bucket: location.to_string(), why: format!("tried {}: {why}", tried(location)) }
}

/// Where credentials are looked for, in words.
pub(super) fn tried(location: &S3Location) -> String {
    let profile = location.profile.as_deref().map(|name| format!(" (profile {name})")).unwrap_or_default();
    match &location.credentials {
        Some(file) => format!("the file {}{profile}", file.display()),
        None => format!("the environment, the AWS profile{profile}, web identity, container and instance metadata"),
    }
}
