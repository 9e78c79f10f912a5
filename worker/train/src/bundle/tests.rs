//! What is written is read again, and nothing else is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod weights;

use std::collections::BTreeMap;

use emberline_common::{artifact::ManifestFile, spec::kinds::train::Activation, time::Timestamp};
use emberline_worker::documents::{ModelDocument, ModelInput};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Map, json};

use super::*;
use crate::network::{CnnShape, MlpShape, Shape};

fn about() -> About {
    About {
        model: "m".parse().unwrap(),
        version: 3,
        created_at: Timestamp(1_700_000_000_000_000),
        metrics: Map::from_iter([("f1".to_owned(), json!(0.75))]),
        notes: "a note".to_owned(),
        tags: BTreeMap::from([("team".to_owned(), "vision".to_owned())]),
        lineage: BTreeMap::from([("raw/data".to_owned(), Digest::of(b"data"))]),
        code: None,
        parent: Some(2),
        made_by: None,
    }
}

fn mlp() -> Shape {
    Shape::Mlp(MlpShape {
        inputs: 3,
        hidden: vec![4, 5],
        outputs: 2,
        activation: Activation::Relu,
        dropout: 0.1,
        batch_norm: true,
    })
}

fn cnn() -> Shape {
    Shape::Cnn(CnnShape {
        image: [1, 4, 4],
        channels: vec![2],
        hidden: 3,
        outputs: 2,
        dropout: 0.0,
    })
}

fn table() -> Value {
    json!({"type": "table", "columns": [
        {"type": "standardised", "column": "a", "mean": 0.1, "deviation": 2.0},
        {"type": "one_hot", "column": "k", "categories": ["x", "y"]},
    ]})
}

fn document(shape: &Shape, features: Value, weights: &[u8]) -> ModelDocument {
    ModelDocument {
        format: 1,
        spec: json!({}),
        family: "mlp".to_owned(),
        task: "classification".to_owned(),
        label: "y".to_owned(),
        classes: vec!["no".to_owned(), "yes".to_owned()],
        inputs: vec![ModelInput {
            name: "a".to_owned(),
            column_type: "float".to_owned(),
            categories: Vec::new(),
            min: Some(0.1),
            max: Some(3.0),
        }],
        preprocessing: json!({
            "features": features,
            "label": {"type": "classes", "column": "y", "classes": ["no", "yes"]},
        }),
        network: serde_json::to_value(shape).unwrap(),
        parameters: shape.parameters(),
        train_rows: 1,
        validation_rows: 1,
        backend: "cpu".to_owned(),
        best_epoch: 1,
        history: Vec::new(),
        reference: None,
        weights_sha256: Digest::of(weights).to_string(),
    }
}

fn manifest(document: &[u8], weights: &[u8]) -> Vec<u8> {
    let file = |path: &str, content: &[u8]| ManifestFile {
        path: path.to_owned(),
        sha256: Digest::of(content),
        bytes: content.len() as u64,
    };
    let files = vec![file(MODEL_FILE, document), file(WEIGHTS_FILE, weights)];
    serde_json::to_vec(&Manifest::new(ArtifactType::Model, files, Map::new())).unwrap()
}

fn weights(shape: &Shape) -> Vec<u8> {
    shape.init(1, &Compute::cpu().device).to_bytes().unwrap()
}

fn bundle_of(shape: &Shape, features: Value) -> Bundle {
    let weights = weights(shape);
    let document = serde_json::to_vec(&document(shape, features, &weights)).unwrap();
    let manifest = manifest(&document, &weights);
    Bundle::new(about(), &manifest, document, weights).unwrap()
}

fn bundle() -> Bundle {
    bundle_of(&mlp(), table())
}

fn bytes(bundle: &Bundle) -> Vec<u8> {
    let mut out = Vec::new();
    bundle.write(&mut out).unwrap();
    out
}

fn read(mut bytes: &[u8]) -> Result<Bundle, BundleError> {
    Bundle::read(&mut bytes)
}

/// An archive of these files, with `bundle.json` as `change` makes it; its list is right before.
fn archive(files: [Vec<u8>; 5], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let listed = FILES.iter().zip(&files).map(|((name, _), content)| {
        json!({"name": name, "sha256": Digest::of(content), "bytes": content.len()})
    });
    let manifest = String::from_utf8(manifest(&files[0], &files[1])).unwrap();
    let mut first = json!({
        "format": 1,
        "about": about(),
        "artifact": {"sha256": Digest::of(manifest.as_bytes()), "manifest": manifest},
        "files": listed.collect::<Vec<_>>(),
    });
    change(&mut first);
    let mut out = Vec::new();
    tar::write(&mut out, ABOUT_FILE, first.to_string().as_bytes()).unwrap();
    for ((name, _), content) in FILES.iter().zip(&files) {
        tar::write(&mut out, name, content).unwrap();
    }
    tar::write_end(&mut out).unwrap();
    out
}

fn files(bundle: &Bundle) -> [Vec<u8>; 5] {
    let [_, a, b, c, d, e] = bundle.contents.clone();
    [a, b, c, d, e]
}

#[track_caller]
fn refused(bytes: &[u8], part: &str) {
    let told = read(bytes).expect_err("it is refused").to_string();
    assert!(told.contains(part), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
}

#[test]
fn what_is_written_is_read_again_and_always_the_same_bytes() {
    for bundle in [
        bundle(),
        bundle_of(
            &cnn(),
            json!({
                "type": "image", "shape": [1, 4, 4], "max_value": 255.0, "source": {"column": "a"},
            }),
        ),
    ] {
        let written = bytes(&bundle);
        assert_eq!(written.len() % 512, 0);
        let again = read(&written).unwrap();
        assert_eq!(
            (again.about(), again.artifact()),
            (&about(), bundle.artifact())
        );
        assert_eq!(bytes(&again), written);
        let document = again.model().unwrap();
        assert_eq!(document.document(), bundle.model().unwrap().document());
    }
}

#[test]
fn tensors_have_the_names_of_the_layers_and_their_inputs_first() {
    let bundle = bundle();
    let tensors = SafeTensors::deserialize(&bundle.contents[3]).unwrap();
    let shapes: BTreeMap<String, Vec<usize>> = (tensors.tensors().into_iter())
        .map(|(name, tensor)| (name, tensor.shape().to_vec()))
        .collect();
    let told: Vec<String> = shapes.iter().map(|(n, s)| format!("{n} {s:?}")).collect();
    assert_eq!(
        told,
        [
            "hidden.0.bias [4]",
            "hidden.0.weight [3, 4]",
            "hidden.1.bias [5]",
            "hidden.1.weight [4, 5]",
            "norms.0.beta [4]",
            "norms.0.gamma [4]",
            "norms.0.running_mean [4]",
            "norms.0.running_var [4]",
            "norms.1.beta [5]",
            "norms.1.gamma [5]",
            "norms.1.running_mean [5]",
            "norms.1.running_var [5]",
            "output.bias [2]",
            "output.weight [5, 2]",
        ]
    );
}

#[test]
fn what_is_cut_off_or_followed_by_something_is_refused() {
    let whole = bytes(&bundle());
    refused(&[], "it ends in the header of `bundle.json`");
    for length in (0..whole.len()).step_by(97) {
        assert!(read(&whole[..length]).is_err(), "{length} bytes");
    }
    refused(
        &whole[..whole.len() - 1],
        "it ends in the end of the archive",
    );
    refused(
        &[&whole[..], &[0]].concat(),
        "something follows the last file",
    );
    refused(
        &[&whole[..], &whole[..]].concat(),
        "something follows the last file",
    );
    let text = "PK\x03\x04 or anything else ".repeat(100);
    refused(
        text.as_bytes(),
        "the header of `bundle.json` is not the one of a bundle",
    );
}

#[test]
fn names_links_and_sizes_that_a_bundle_does_not_have_are_refused() {
    let whole = bytes(&bundle());
    // A header that is right in itself, but for another file, a link, another owner.
    let forged = |change: &dyn Fn(&mut [u8])| {
        let mut forged = whole.clone();
        change(&mut forged[..512]);
        forged[148..156].copy_from_slice(b"        ");
        let sum: u32 = forged[..512].iter().map(|b| u32::from(*b)).sum();
        forged[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        forged
    };
    assert!(
        read(&forged(&|_| {})).is_ok(),
        "the forging itself is no fault"
    );
    let no_bundle = "the header of `bundle.json` is not the one of a bundle";
    refused(
        &forged(&|h| h[..16].copy_from_slice(b"../../etc/passwd")),
        no_bundle,
    );
    refused(&forged(&|h| h[156] = b'2'), no_bundle);
    refused(&forged(&|h| h[156] = b'5'), no_bundle);
    refused(&forged(&|h| h[345..348].copy_from_slice(b"dir")), no_bundle);
    refused(&forged(&|h| h[106] = b'7'), no_bundle);
    refused(
        &forged(&|h| h[124..135].copy_from_slice(b"77777777777")),
        "at most 1048576 are read",
    );
    refused(
        &forged(&|h| h[124..135].copy_from_slice(b"xxxxxxxxxxx")),
        no_bundle,
    );
    refused(&forged(&|h| h[124] = 0x80), no_bundle);
}

#[test]
fn files_twice_missing_or_out_of_order_are_refused() {
    let bundle = bundle();
    let archive = |order: &[usize]| {
        let names = [ABOUT_FILE].into_iter().chain(FILES.map(|(name, _)| name));
        let names: Vec<&str> = names.collect();
        let mut out = Vec::new();
        for at in order {
            tar::write(&mut out, names[*at], &bundle.contents[*at]).unwrap();
        }
        tar::write_end(&mut out).unwrap();
        out
    };
    assert!(read(&archive(&[0, 1, 2, 3, 4, 5])).is_ok());
    refused(
        &archive(&[0, 1, 1, 2, 3, 4, 5]),
        "the header of `weights.bpk`",
    );
    refused(&archive(&[0, 1, 3, 4, 5]), "the header of `weights.bpk`");
    refused(&archive(&[0, 2, 1, 3, 4, 5]), "the header of `model.json`");
    refused(
        &archive(&[0, 1, 2, 3, 4]),
        "the header of `preprocessing.json`",
    );
    refused(
        &archive(&[0, 1, 2, 3, 4, 5, 5]),
        "something follows the last file",
    );
}

#[test]
fn what_the_first_file_says_must_be_so() {
    let files = files(&bundle());
    assert!(read(&archive(files.clone(), |_| {})).is_ok());
    let changed = |change: fn(&mut Value), part: &str| {
        refused(&archive(files.clone(), change), part);
    };
    changed(
        |first| first["format"] = json!(2),
        "the bundle has format 2",
    );
    changed(
        |first| first["format"] = json!("1"),
        "`bundle.json`: invalid type",
    );
    changed(|first| first["more"] = json!(1), "unknown field `more`");
    changed(
        |first| first["about"]["model"] = json!("../m"),
        "no model name",
    );
    changed(
        |first| first["files"] = json!([]),
        "`bundle.json` lists other files",
    );
    changed(
        |first| first["files"][2]["bytes"] = json!(7),
        "`weights.safetensors` is not the file that `bundle.json` lists",
    );
    changed(
        |first| first["files"][3]["sha256"] = json!(Digest::of(b"other")),
        "`schema.json` is not the file that `bundle.json` lists",
    );
    changed(
        |first| first["artifact"]["manifest"] = json!("{}"),
        "the artifact's manifest has another SHA-256",
    );
    changed(
        |first| {
            let text = first["artifact"]["manifest"].as_str().unwrap();
            let text = text.replace("weights.bpk", "weights.exe");
            first["artifact"]["sha256"] = json!(Digest::of(text.as_bytes()));
            first["artifact"]["manifest"] = json!(text);
        },
        "lists other files than `model.json` and `weights.bpk`",
    );
    changed(
        |first| {
            let text = first["artifact"]["manifest"].as_str().unwrap();
            let text = text.replace("\"model\"", "\"files\"");
            first["artifact"]["sha256"] = json!(Digest::of(text.as_bytes()));
            first["artifact"]["manifest"] = json!(text);
        },
        "is of no model",
    );
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let own = files(&bundle());
    let with = |at: usize, content: Vec<u8>| {
        let mut files = own.clone();
        files[at] = content;
        archive(files, |_| {})
    };
    let other_weights = mlp().init(2, &Compute::cpu().device).to_bytes().unwrap();
    refused(
        &with(1, other_weights.clone()),
        "is not the file that `model.json` was written with",
    );
    refused(&with(2, b"short".to_vec()), "`weights.safetensors`: ");
    refused(
        &with(3, b"[]".to_vec()),
        "`schema.json` is another one than in `model.json`",
    );
    refused(
        &with(4, b"{}".to_vec()),
        "`preprocessing.json` is another one",
    );
    let network = mlp().load(other_weights, &Compute::cpu().device).unwrap();
    let others = tensors::write(&network).unwrap();
    refused(&with(2, others), "is another one than in `weights.bpk`");
}

#[test]
fn a_small_file_cannot_ask_for_a_large_network() {
    let own = files(&bundle());
    let with = |network: Value| {
        let mut document: Value = serde_json::from_slice(&own[0]).unwrap();
        document["network"] = network;
        let mut files = own.clone();
        files[0] = serde_json::to_vec(&document).unwrap();
        archive(files, |_| {})
    };
    let mlp = |inputs: u64, hidden: Value| {
        json!({"family": "mlp", "inputs": inputs, "hidden": hidden, "outputs": 2,
               "activation": "relu", "dropout": 0.0, "batch_norm": false})
    };
    let cnn = |image: Value, channels: Value| {
        json!({"family": "cnn", "image": image, "channels": channels, "hidden": 3, "outputs": 2,
               "dropout": 0.0})
    };
    refused(
        &with(mlp(3, json!([1 << 20, 1 << 20]))),
        "parameters, more than 268435456",
    );
    refused(
        &with(mlp(3, json!([u64::MAX]))),
        "a layer of the network has the width",
    );
    refused(
        &with(mlp(3, json!([0]))),
        "a layer of the network has the width 0",
    );
    refused(
        &with(mlp(3, json!([1 << 20]))),
        "the network's parameters alone take",
    );
    refused(
        &with(mlp(4, json!([4, 5]))),
        "the preprocessing gives 3 numbers",
    );
    refused(
        &with(cnn(json!([u64::MAX, 2, 2]), json!([2]))),
        "an image has the shape",
    );
    refused(
        &with(cnn(json!([1, 0, 2]), json!([2]))),
        "an image has the shape",
    );
    refused(
        &with(cnn(json!([1, 2, 2]), json!([2, 2]))),
        "too small for its blocks",
    );
}

#[test]
fn what_is_no_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let told = Bundle::open(dir.path()).unwrap_err().to_string();
    assert!(told.contains("it is no regular file"), "{told}");
    let told = Bundle::open(&dir.path().join("none"))
        .unwrap_err()
        .to_string();
    assert!(told.contains("cannot be read"), "{told}");
    let path = dir.path().join("m.bundle");
    std::fs::write(&path, bytes(&bundle())).unwrap();
    assert_eq!(Bundle::open(&path).unwrap().about(), &about());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever byte is changed: it is refused, or the model is the same to the last byte.
    #[test]
    fn a_changed_byte_is_refused_or_leaves_the_model_alone(at: prop::sample::Index, bit in 0..8_u8) {
        let bundle = bundle();
        let mut changed = bytes(&bundle);
        let at = at.index(changed.len());
        changed[at] ^= 1 << bit;
        if let Ok(read) = read(&changed) {
            prop_assert!(at < 512 + bundle.contents[0].len(), "byte {at} is not of `bundle.json`");
            prop_assert_eq!(read.artifact(), bundle.artifact());
            prop_assert_eq!(&read.contents[1..], &bundle.contents[1..]);
        }
    }

    /// Weights that somebody has forged, with all digests right: refused or loaded, never a panic.
    #[test]
    fn forged_weights_do_no_harm(at: prop::sample::Index, byte: u8) {
        let mut files = files(&bundle());
        let at = at.index(files[1].len());
        files[1][at] = byte;
        let mut document: Value = serde_json::from_slice(&files[0]).unwrap();
        document["weights_sha256"] = json!(Digest::of(&files[1]));
        files[0] = serde_json::to_vec(&document).unwrap();
        let _ = read(&archive(files, |_| {}));
    }

    /// The same for the safetensors.
    #[test]
    fn forged_tensors_are_refused_unless_they_say_the_same(at: prop::sample::Index, byte: u8) {
        let own = files(&bundle());
        let mut forged = own.clone();
        let at = at.index(forged[2].len());
        forged[2][at] = byte;
        if read(&archive(forged.clone(), |_| {})).is_ok() {
            // A blank of the header may be another one; the numbers are the same.
            let tensors = |file: &[u8]| {
                let all = SafeTensors::deserialize(file).unwrap().tensors();
                let mut all: Vec<_> = (all.into_iter())
                    .map(|(name, tensor)| (name, tensor.shape().to_vec(), tensor.data().to_vec()))
                    .collect();
                all.sort();
                all
            };
            prop_assert_eq!(tensors(&forged[2]), tensors(&own[2]));
        }
    }
}
