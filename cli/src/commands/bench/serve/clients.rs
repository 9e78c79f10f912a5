//! One client over one connection that stays open, by gRPC or REST.

use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use emberline_proto::inference::{
    ModelInferRequest, grpc_inference_service_client::GrpcInferenceServiceClient,
    model_infer_request::InferInputTensor,
};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tonic::transport::Channel;

use super::asking::{Ask, Protocol};

/// What all clients ask, in the form of their protocol.
pub(super) enum Requests {
    Grpc(Vec<ModelInferRequest>),
    Rest { path: String, bodies: Vec<Bytes> },
}

impl Requests {
    pub(super) fn of(ask: &Ask) -> anyhow::Result<Self> {
        anyhow::ensure!(!ask.requests.is_empty(), "there is nothing to ask");
        Ok(match ask.protocol {
            Protocol::Grpc => {
                let requests = ask.requests.iter();
                let requests = requests.map(|body| raw(&ask.model, body));
                Self::Grpc(requests.collect::<anyhow::Result<_>>()?)
            }
            Protocol::Rest => Self::Rest {
                path: format!("/v2/models/{}/infer", ask.model),
                bodies: (ask.requests.iter().map(|body| body.to_string().into())).collect(),
            },
        })
    }
}

/// The body of a request.
#[derive(Deserialize)]
struct Body {
    inputs: Vec<Input>,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    data: Vec<Value>,
}

/// The same request over gRPC, with raw contents.
fn raw(model: &str, body: &Value) -> anyhow::Result<ModelInferRequest> {
    let mut request = ModelInferRequest {
        model_name: model.to_owned(),
        ..ModelInferRequest::default()
    };
    for input in Body::deserialize(body)?.inputs {
        let mut contents = Vec::new();
        for value in &input.data {
            little_endian(&input.datatype, value, &mut contents)
                .with_context(|| format!("{value} is no {}", input.datatype))?;
        }
        request.raw_input_contents.push(contents.into());
        request.inputs.push(InferInputTensor {
            name: input.name,
            datatype: input.datatype,
            shape: input.shape,
            ..InferInputTensor::default()
        });
    }
    Ok(request)
}

fn little_endian(datatype: &str, value: &Value, contents: &mut Vec<u8>) -> Option<()> {
    match datatype {
        "BOOL" => contents.push(u8::from(value.as_bool()?)),
        "UINT8" => contents.push(u8::try_from(value.as_u64()?).ok()?),
        "INT64" => contents.extend(value.as_i64()?.to_le_bytes()),
        "FP64" => contents.extend(value.as_f64()?.to_le_bytes()),
        "BYTES" => {
            let text = value.as_str()?;
            contents.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
            contents.extend(text.as_bytes());
        }
        _ => return None,
    }
    Some(())
}

/// A client with its connection.
pub(super) struct Client {
    address: String,
    requests: Arc<Requests>,
    connection: Connection,
}

enum Connection {
    Grpc(GrpcInferenceServiceClient<Channel>),
    Rest(SendRequest<Full<Bytes>>),
}

impl Client {
    pub(super) async fn connect(address: &str, requests: Arc<Requests>) -> anyhow::Result<Self> {
        let connection = match &*requests {
            Requests::Grpc(_) => {
                let endpoint = Channel::from_shared(format!("http://{address}"))?;
                Connection::Grpc(GrpcInferenceServiceClient::new(endpoint.connect().await?))
            }
            Requests::Rest { .. } => Connection::Rest(open(address).await?),
        };
        Ok(Self {
            address: address.to_owned(),
            requests,
            connection,
        })
    }

    /// Asks the request with this number, and gives the version that answered.
    pub(super) async fn infer(&mut self, number: usize) -> Result<String, String> {
        match (&*self.requests, &mut self.connection) {
            (Requests::Grpc(all), Connection::Grpc(client)) => {
                let answer = client.model_infer(all[number % all.len()].clone()).await;
                let answer = answer.map_err(|status| status.to_string())?.into_inner();
                Ok(answer.model_version)
            }
            (Requests::Rest { path, bodies }, Connection::Rest(connection)) => {
                if connection.is_closed() {
                    let opened = open(&self.address).await;
                    *connection = opened.map_err(|e| format!("{e:#}"))?;
                }
                let body = bodies[number % bodies.len()].clone();
                let request = Request::post(path)
                    .header(header::HOST, &self.address)
                    .header(header::CONTENT_TYPE, "application/json")
                    .body(Full::new(body));
                post(connection, request.map_err(|e| e.to_string())?).await
            }
            _ => Err("the connection is of another protocol".to_owned()),
        }
    }
}

async fn open(address: &str) -> anyhow::Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It ends with the sender; what goes wrong, the sender is told.
    tokio::spawn(connection);
    Ok(sender)
}

/// What is looked at of an answer.
#[derive(Deserialize)]
struct Answer {
    model_version: String,
}

async fn post(
    connection: &mut SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> Result<String, String> {
    let answer = connection.send_request(request).await;
    let answer = answer.map_err(|e| e.to_string())?;
    let status = answer.status();
    let body = answer.into_body().collect().await;
    let body = body.map_err(|e| e.to_string())?.to_bytes();
    if status != StatusCode::OK {
        return Err(format!("{status}: {}", String::from_utf8_lossy(&body)));
    }
    let answer: Answer = serde_json::from_slice(&body).map_err(|e| e.to_string())?;
    Ok(answer.model_version)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_body_of_json_becomes_the_same_request_with_raw_contents() {
        let input = |name: &str, datatype: &str, data: Value| json!({"name": name, "datatype": datatype, "shape": [1], "data": data});
        let body = json!({"inputs": [
            input("n", "INT64", json!([-2])),
            input("x", "FP64", json!([0.5])),
            input("yes", "BOOL", json!([true])),
            input("text", "BYTES", json!(["ab"])),
            input("image", "UINT8", json!([0, 255])),
        ]});
        let request = raw("m", &body).unwrap();
        let expected: [&[u8]; 5] = [
            &(-2i64).to_le_bytes(),
            &0.5f64.to_le_bytes(),
            &[1],
            b"\x02\0\0\0ab",
            &[0, 255],
        ];
        assert_eq!(request.raw_input_contents, expected);
        assert_eq!(request.inputs[4].name, "image");
        let wrong = json!({"inputs": [input("n", "INT64", json!([0.5]))]});
        assert!(raw("m", &wrong).is_err());
    }
}
