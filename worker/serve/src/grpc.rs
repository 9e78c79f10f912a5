//! The gRPC services: they translate, and nothing else.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use emberline_proto::{
    inference::{
        InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
        ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
        RepositoryIndexRequest, RepositoryIndexResponse, ServerLiveRequest, ServerLiveResponse,
        ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
        grpc_inference_service_server::GrpcInferenceService, infer_parameter::ParameterChoice,
        model_infer_request::InferInputTensor, model_infer_response::InferOutputTensor,
        model_metadata_response::TensorMetadata, repository_index_response::ModelIndex,
    },
    v1::{
        FeedbackOutcome, SubmitFeedbackRequest, SubmitFeedbackResponse, feedback_label,
        feedback_service_server::FeedbackService,
    },
};
use emberline_train::{fit::most_probable, model::Predictions};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{
    access,
    error::{InferError, cut},
    feedback::Truth,
    infer::{self, Answer},
    relay::{By, Label},
    rest::{PLATFORM, SERVER},
    schema::Output,
    server::Inner,
    tensor::{Contents, Tensor, write_bytes},
};

/// `inference.GRPCInferenceService`.
#[derive(Clone)]
pub(crate) struct Inference(pub Arc<Inner>);

/// `emberline.v1.FeedbackService`.
#[derive(Clone)]
pub(crate) struct Feedback(pub Arc<Inner>);

/// How long the caller waits, by `grpc-timeout`: at most eight digits and a unit.
fn timeout_of(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = (digits.len() <= 8).then(|| digits.parse().ok())??;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// What the parameters of a request or a tensor say that cannot be passed over.
fn check_parameters(
    of: &str,
    parameters: &HashMap<String, InferParameter>,
) -> Result<(), InferError> {
    for name in ["shared_memory_region", "classification", "sequence_id"] {
        if parameters.contains_key(name) {
            return Err(InferError::Unsupported(format!(
                "{of} has the parameter `{name}`, which this server does not offer"
            )));
        }
    }
    Ok(())
}

fn timeout_parameter(parameters: &HashMap<String, InferParameter>) -> Option<Duration> {
    match parameters.get("timeout")?.parameter_choice.as_ref()? {
        ParameterChoice::Int64Param(micros) => {
            Some(Duration::from_micros(u64::try_from(*micros).ok()?)).filter(|d| !d.is_zero())
        }
        ParameterChoice::Uint64Param(micros) => {
            Some(Duration::from_micros(*micros)).filter(|d| !d.is_zero())
        }
        _ => None,
    }
}

/// The one field of the contents that has something in it.
fn contents_of(name: &str, contents: InferTensorContents) -> Result<Contents, InferError> {
    let InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = contents;
    let fields = [
        (!bool_contents.is_empty()).then_some(Contents::Bools(bool_contents)),
        (!int_contents.is_empty()).then_some(Contents::Int32s(int_contents)),
        (!int64_contents.is_empty()).then_some(Contents::Int64s(int64_contents)),
        (!uint_contents.is_empty()).then_some(Contents::Uint32s(uint_contents)),
        (!uint64_contents.is_empty()).then_some(Contents::Uint64s(uint64_contents)),
        (!fp32_contents.is_empty()).then_some(Contents::Fp32s(fp32_contents)),
        (!fp64_contents.is_empty()).then_some(Contents::Fp64s(fp64_contents)),
        (!bytes_contents.is_empty()).then_some(Contents::Bytes(bytes_contents)),
    ];
    let mut full = fields.into_iter().flatten();
    match (full.next(), full.next()) {
        (None, _) => Ok(Contents::Missing),
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => Err(InferError::column(name, "has values in several fields")),
    }
}

fn tensors_of(inputs: Vec<InferInputTensor>, raw: Vec<Bytes>) -> Result<Vec<Tensor>, InferError> {
    if !raw.is_empty() && raw.len() != inputs.len() {
        return Err(InferError::bad(
            "raw_input_contents",
            format!(
                "there are {} raw contents for {} inputs: send one for each",
                raw.len(),
                inputs.len()
            ),
        ));
    }
    let is_raw = !raw.is_empty();
    let mut raw = raw.into_iter();
    let tensors = inputs.into_iter().map(|input| {
        let InferInputTensor {
            name,
            datatype,
            shape,
            parameters,
            contents,
        } = input;
        check_parameters(&format!("the input `{}`", cut(&name)), &parameters)?;
        let contents = match (is_raw, contents) {
            (true, Some(_)) => {
                let why = "has raw and typed contents: send one of them";
                return Err(InferError::column(&name, why));
            }
            (true, None) => raw.next().map_or(Contents::Missing, Contents::Raw),
            (false, Some(contents)) => contents_of(&name, contents)?,
            (false, None) => Contents::Missing,
        };
        Ok(Tensor {
            name,
            datatype,
            shape,
            contents,
        })
    });
    tensors.collect()
}

/// What a message asks for; who asks, and how long it waits by its headers, is not in it.
pub(crate) fn request_of(request: ModelInferRequest) -> Result<infer::Request, InferError> {
    check_parameters("the request", &request.parameters)?;
    for output in &request.outputs {
        let of = format!("the output `{}`", cut(&output.name));
        check_parameters(&of, &output.parameters)?;
    }
    Ok(infer::Request {
        within: timeout_parameter(&request.parameters),
        model: request.model_name,
        version: request.model_version,
        id: request.id,
        inputs: tensors_of(request.inputs, request.raw_input_contents)?,
        outputs: request.outputs.into_iter().map(|o| o.name).collect(),
        arrived: Instant::now(),
        caller: None,
    })
}

/// The most probable class of each row.
pub(crate) fn classes_of(answer: &Answer) -> Vec<&str> {
    let Predictions::Probabilities { classes, values } = &*answer.predictions else {
        return Vec::new();
    };
    let names = &answer.version.schema.classes;
    let name = |class: u32| names.get(class as usize).map_or("", String::as_str);
    most_probable(values, *classes)
        .into_iter()
        .map(name)
        .collect()
}

/// All numbers of an answer.
pub(crate) fn numbers_of(answer: &Answer) -> &[f64] {
    let (Predictions::Probabilities { values, .. } | Predictions::Values(values)) =
        &*answer.predictions;
    values
}

/// The shape of an output.
#[allow(clippy::cast_possible_wrap, reason = "rows of a request, and classes")]
pub(crate) fn shape_of(answer: &Answer, output: Output) -> Vec<i64> {
    match output {
        Output::Probabilities => {
            vec![
                answer.rows as i64,
                answer.version.schema.classes.len() as i64,
            ]
        }
        Output::Class | Output::Value => vec![answer.rows as i64],
    }
}

/// The little-endian bytes of an output.
pub(crate) fn raw_of(answer: &Answer, output: Output) -> Vec<u8> {
    match output {
        Output::Probabilities | Output::Value => {
            let numbers = numbers_of(answer).iter();
            numbers.flat_map(|number| number.to_le_bytes()).collect()
        }
        Output::Class => write_bytes(classes_of(answer).into_iter().map(str::as_bytes)),
    }
}

fn response_of(answer: &Answer, raw: bool) -> ModelInferResponse {
    let outputs = answer.outputs.iter().map(|output| InferOutputTensor {
        name: output.name().to_owned(),
        datatype: output.datatype().to_owned(),
        shape: shape_of(answer, *output),
        parameters: HashMap::new(),
        contents: (!raw).then(|| match output {
            Output::Probabilities | Output::Value => InferTensorContents {
                fp64_contents: numbers_of(answer).to_vec(),
                ..InferTensorContents::default()
            },
            Output::Class => InferTensorContents {
                bytes_contents: (classes_of(answer).into_iter())
                    .map(|class| Bytes::copy_from_slice(class.as_bytes()))
                    .collect(),
                ..InferTensorContents::default()
            },
        }),
    });
    let outputs = outputs.collect();
    let contents = answer.outputs.iter().filter(|_| raw);
    ModelInferResponse {
        model_name: answer.version.model.to_string(),
        model_version: answer.version.text.clone(),
        id: answer.id.to_string(),
        parameters: HashMap::new(),
        outputs,
        raw_output_contents: contents
            .map(|output| raw_of(answer, *output).into())
            .collect(),
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(
        &self,
        _: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        let ready = self.0.is_ready();
        Ok(Response::new(ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let routes = self.0.routes.load();
        let ready = match routes.find(&name)?.named(&version) {
            Ok(_) => true,
            Err(InferError::NotReady(_)) => false,
            Err(error) => return Err(error.into()),
        };
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: SERVER.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: vec!["model_repository".to_owned()],
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let routes = self.0.routes.load();
        let route = routes.find(&name)?;
        let version = route.named(&version)?;
        let schema = &version.schema;
        let inputs = schema.inputs.iter().map(|input| TensorMetadata {
            name: input.name.clone(),
            datatype: input.datatype().to_owned(),
            shape: vec![-1],
        });
        let outputs = schema.outputs().iter().map(|output| TensorMetadata {
            name: output.name().to_owned(),
            datatype: output.datatype().to_owned(),
            shape: schema.shape_of(*output),
        });
        Ok(Response::new(ModelMetadataResponse {
            name,
            versions: route.ready.iter().map(|v| v.text.clone()).collect(),
            platform: format!("{PLATFORM}_{}", version.family),
            inputs: inputs.collect(),
            outputs: outputs.collect(),
        }))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let arrived = Instant::now();
        let within = timeout_of(request.metadata());
        let caller = request.metadata().get("traceparent");
        let caller = caller.and_then(|text| text.to_str().ok()?.parse().ok());
        let request = request.into_inner();
        let is_raw = !request.raw_input_contents.is_empty();
        let request = request_of(request)?;
        let request = infer::Request {
            within: match (within, request.within) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            arrived,
            caller,
            ..request
        };
        let answer = self.0.infer(request).await?;
        Ok(Response::new(response_of(&answer, is_raw)))
    }

    async fn repository_index(
        &self,
        request: Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let only_ready = request.into_inner().ready;
        let models = self.0.index(only_ready).into_iter();
        let models = models.map(|(name, version, state, reason)| ModelIndex {
            name,
            version,
            state: state.to_owned(),
            reason,
        });
        Ok(Response::new(RepositoryIndexResponse {
            models: models.collect(),
        }))
    }
}

#[tonic::async_trait]
impl FeedbackService for Feedback {
    async fn submit_feedback(
        &self,
        request: Request<SubmitFeedbackRequest>,
    ) -> Result<Response<SubmitFeedbackResponse>, Status> {
        let shown = access::shown(request.metadata().as_ref()).cloned();
        let SubmitFeedbackRequest {
            model,
            labels,
            relayed,
        } = request.into_inner();
        let told = if relayed {
            By::Replica
        } else {
            By::Client(shown)
        };
        let labels = labels.into_iter().enumerate().map(|(at, label)| {
            let truth = match label.truth {
                Some(feedback_label::Truth::Class(class)) => Truth::Class(class),
                Some(feedback_label::Truth::Value(value)) => Truth::Value(value),
                None => {
                    let field = format!("labels[{at}].truth");
                    let why =
                        format!("the label at place {at} says nothing: set `class` or `value`");
                    return Err(InferError::bad(field, why));
                }
            };
            Ok(Label {
                request_id: label.request_id,
                row: label.row,
                truth,
            })
        });
        let labels = labels.collect::<Result<Vec<_>, _>>()?;
        let outcomes = self.0.take_labels(&model, labels, told).await?;
        let outcomes = outcomes.into_iter().map(FeedbackOutcome::from);
        Ok(Response::new(SubmitFeedbackResponse {
            outcomes: outcomes.collect(),
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_patience_is_read_with_its_unit() {
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            timeout_of(&metadata)
        };
        assert_eq!(of("250m"), Some(Duration::from_millis(250)));
        assert_eq!(
            of("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in ["", "m", "1", "123456789S", "-1S", "1x"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
