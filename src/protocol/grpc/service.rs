//! The service's methods as tonic calls them: each converts, asks the engine, converts back. Infer requests are read
//! and answered before tonic sees them.

use std::collections::HashMap;
use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};

use super::intake::Intake;
use super::proto::grpc_inference_service_server::GrpcInferenceService;
use super::proto::model_repository_parameter::ParameterChoice;
use super::proto::{
    self, ModelRepositoryParameter, model_metadata_response::TensorMetadata, repository_index_response::ModelIndex,
};
use super::stream::Answers;
use super::{convert, status_of};
use crate::engine::{Engine, ModelInfo};
use crate::error::{Error, Kind, Result};
use crate::protocol::{common, triton};
use crate::tensor::TensorSpec;

pub(super) struct InferenceService {
    engine: Arc<Engine>,
    repository_api: bool,
}

impl InferenceService {
    /// `repository_api`: models may be loaded and unloaded here.
    pub(super) fn new(engine: Arc<Engine>, repository_api: bool) -> Self {
        InferenceService { engine, repository_api }
    }

    /// The name of the model that was loaded.
    async fn load(&self, message: proto::RepositoryModelLoadRequest) -> Result<String> {
        let proto::RepositoryModelLoadRequest { repository_name, model_name: name, parameters } = message;
        common::check_repository_api(&self.engine, self.repository_api)?;
        let name = model_name(repository_name, name)?;
        self.engine.load(&name, config(&parameters)?).await?;
        Ok(name)
    }

    /// The name of the model that was unloaded. No model depends on another one: parameters say nothing.
    async fn unload(&self, message: proto::RepositoryModelUnloadRequest) -> Result<String> {
        common::check_repository_api(&self.engine, self.repository_api)?;
        let name = model_name(message.repository_name, message.model_name)?;
        self.engine.unload(&name).await?;
        Ok(name)
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for InferenceService {
    async fn server_live(
        &self,
        request: Request<proto::ServerLiveRequest>,
    ) -> Result<Response<proto::ServerLiveResponse>, Status> {
        Intake::reach(&request)?;
        Ok(Response::new(proto::ServerLiveResponse { live: self.engine.live() }))
    }

    async fn server_ready(
        &self,
        request: Request<proto::ServerReadyRequest>,
    ) -> Result<Response<proto::ServerReadyResponse>, Status> {
        Intake::reach(&request)?;
        Ok(Response::new(proto::ServerReadyResponse { ready: self.engine.ready() }))
    }

    async fn model_ready(
        &self,
        request: Request<proto::ModelReadyRequest>,
    ) -> Result<Response<proto::ModelReadyResponse>, Status> {
        Intake::reach(&request)?;
        let proto::ModelReadyRequest { name, version } = request.into_inner();
        let ready =
            convert::model(name, &version).and_then(|model| self.engine.model_ready(&model.name, model.version));
        match ready {
            Ok(ready) => Ok(Response::new(proto::ModelReadyResponse { ready })),
            // An unknown model is not ready: clients ask until it is there.
            Err(error) if error.kind() == Kind::NotFound => {
                Ok(Response::new(proto::ModelReadyResponse { ready: false }))
            }
            Err(error) => Err(status_of(&error)),
        }
    }

    async fn server_metadata(
        &self,
        request: Request<proto::ServerMetadataRequest>,
    ) -> Result<Response<proto::ServerMetadataResponse>, Status> {
        Intake::reach(&request)?;
        let extensions = common::extensions(&self.engine, self.repository_api);
        Ok(Response::new(proto::ServerMetadataResponse {
            name: env!("CARGO_PKG_NAME").to_string(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            extensions: extensions.into_iter().map(str::to_string).collect(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<proto::ModelMetadataRequest>,
    ) -> Result<Response<proto::ModelMetadataResponse>, Status> {
        Intake::reach(&request)?;
        let proto::ModelMetadataRequest { name, version } = request.into_inner();
        let info = convert::model(name, &version).and_then(|model| self.engine.model(&model.name, model.version));
        info.map(|info| Response::new(model_metadata(info))).map_err(|error| status_of(&error))
    }

    async fn model_config(
        &self,
        request: Request<proto::ModelConfigRequest>,
    ) -> Result<Response<proto::ModelConfigResponse>, Status> {
        Intake::reach(&request)?;
        let proto::ModelConfigRequest { name, version } = request.into_inner();
        let setup = convert::model(name, &version).and_then(|model| self.engine.setup(&model));
        let config = setup.map(triton::config).map_err(|error| status_of(&error))?;
        Ok(Response::new(proto::ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: Request<proto::ModelStatisticsRequest>,
    ) -> Result<Response<proto::ModelStatisticsResponse>, Status> {
        Intake::reach(&request)?;
        let proto::ModelStatisticsRequest { name, version } = request.into_inner();
        let model = convert::model(name, &version).map(|model| Some(model).filter(|model| !model.name.is_empty()));
        let statistics = model.and_then(|model| self.engine.statistics(model.as_ref()));
        let statistics = statistics.map_err(|error| status_of(&error))?;
        // As long as there are versions: not for an I/O thread.
        let message = self.engine.cpu().run(move || triton::statistics(statistics)).await;
        message.map(Response::new).map_err(|error| status_of(&error))
    }

    /// Answered by `infer`.
    async fn model_infer(
        &self,
        _: Request<proto::ModelInferRequest>,
    ) -> Result<Response<proto::ModelInferResponse>, Status> {
        Err(status_of(&Error::internal("an infer request came in past what answers it")))
    }

    type ModelStreamInferStream = Answers;

    /// The messages were read before tonic saw them.
    async fn model_stream_infer(
        &self,
        request: Request<Streaming<proto::ModelInferRequest>>,
    ) -> Result<Response<Answers>, Status> {
        Answers::reach(&request).map(Response::new)
    }

    async fn repository_index(
        &self,
        request: Request<proto::RepositoryIndexRequest>,
    ) -> Result<Response<proto::RepositoryIndexResponse>, Status> {
        Intake::reach(&request)?;
        let proto::RepositoryIndexRequest { repository_name, ready } = request.into_inner();
        check_repository(&repository_name).map_err(|error| status_of(&error))?;
        let models = common::index(&self.engine, ready).map(|entry| ModelIndex {
            name: entry.name.to_string(),
            version: entry.version.map(|version| version.to_string()).unwrap_or_default(),
            state: entry.state.to_string(),
            reason: entry.reason,
        });
        Ok(Response::new(proto::RepositoryIndexResponse { models: models.collect() }))
    }

    async fn repository_model_load(
        &self,
        request: Request<proto::RepositoryModelLoadRequest>,
    ) -> Result<Response<proto::RepositoryModelLoadResponse>, Status> {
        Intake::reach(&request)?;
        let model_name = self.load(request.into_inner()).await.map_err(|error| status_of(&error))?;
        Ok(Response::new(proto::RepositoryModelLoadResponse { model_name, is_loaded: true }))
    }

    async fn repository_model_unload(
        &self,
        request: Request<proto::RepositoryModelUnloadRequest>,
    ) -> Result<Response<proto::RepositoryModelUnloadResponse>, Status> {
        Intake::reach(&request)?;
        let model_name = self.unload(request.into_inner()).await.map_err(|error| status_of(&error))?;
        Ok(Response::new(proto::RepositoryModelUnloadResponse { model_name, is_unloaded: true }))
    }
}

type RepositoryParameters = HashMap<String, ModelRepositoryParameter>;

fn check_repository(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, "'repository_name' is not supported: there is one repository"))
}

/// The name in the second field, Triton's, or alone in the first, KServe's.
fn model_name(first: String, second: String) -> Result<String> {
    let name = if second.is_empty() {
        first
    } else {
        check_repository(&first)?;
        second
    };
    common::check_length("the model's name", &name)?;
    Ok(name)
}

fn config(parameters: &RepositoryParameters) -> Result<Option<String>> {
    let config = |(name, value): (&String, &ModelRepositoryParameter)| {
        let text = match &value.parameter_choice {
            Some(ParameterChoice::StringParam(text)) => Some(&**text),
            _ => None,
        };
        common::load_config(name, text)
    };
    // One at the most: any other name is refused.
    parameters.iter().map(config).try_fold(None, |_, config| config.map(Some))
}

fn model_metadata(info: ModelInfo) -> proto::ModelMetadataResponse {
    let tensors = |specs: &[TensorSpec]| {
        let metadata = specs.iter().map(|spec| TensorMetadata {
            name: spec.name.to_string(),
            datatype: spec.dtype.name().to_string(),
            shape: spec.to_wire(),
        });
        metadata.collect()
    };
    proto::ModelMetadataResponse {
        name: info.name.to_string(),
        versions: info.versions.iter().map(|version| version.to_string()).collect(),
        platform: info.platform.to_string(),
        inputs: tensors(&info.signature.inputs),
        outputs: tensors(&info.signature.outputs),
        properties: info.properties.into_iter().map(|(name, value)| (name.to_string(), value)).collect(),
    }
}
