//! The encoders of Hugging Face folders: BERT, DistilBERT and RoBERTa (XLM-R is one), by what `config.json` says.
//!
//! The families differ in names, in how positions are counted and in their heads; one [`Encoder`] describes all. What it
//! does not describe (relative positions, decoders, other heads) is refused rather than computed otherwise.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use super::layers::Activation;
use super::weights::{Needed, Weights, listed};
use super::{Architecture, Description, ENCODER_FILE, MAX_JSON_BYTES, MODULES_FILE, bad, read_json};
use crate::backend::LoadError;
use crate::error::quoted;
use crate::tensor::{DataType, Dim, OutputKind, Signature, TensorSpec};

/// Where sentence-transformers keeps the settings of its second module.
const POOLING_FILE: &str = "1_Pooling/config.json";
/// The most blocks, and the longest side of any matrix: what a `config.json` may make the server add up.
const MAX_LAYERS: usize = 1024;
const MAX_SIZE: usize = 1 << 24;

pub const INPUT_IDS: &str = "input_ids";
pub const ATTENTION_MASK: &str = "attention_mask";
pub const TOKEN_TYPE_IDS: &str = "token_type_ids";
pub const LAST_HIDDEN_STATE: &str = "last_hidden_state";
pub const SENTENCE_EMBEDDING: &str = "sentence_embedding";
pub const LOGITS: &str = "logits";

/// What `model.toml` may add to `config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncoderConfig {
    /// A third input; without it all tokens are of type 0.
    pub token_type_ids: bool,
    /// In place of what the folder says.
    pub pooling: Option<Pooling>,
    pub normalize: Option<bool>,
}

/// How the hidden states of a row's tokens become one embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's.
    Cls,
    Mean,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Bert,
    DistilBert,
    Roberta,
}

/// What stands behind the last block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    Hidden,
    Embedding { pooling: Pooling, normalize: bool },
    Classes { count: usize },
}

/// One encoder, ready to be computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoder {
    pub family: Family,
    pub layers: usize,
    pub heads: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub vocabulary: usize,
    /// The most tokens of one row.
    pub tokens: usize,
    pub positions: usize,
    /// 0 where the family has none.
    pub token_types: usize,
    pub token_type_input: bool,
    /// Of padding, which RoBERTa's positions leave out.
    pub padding: usize,
    pub eps: f64,
    pub activation: Activation,
    pub head: Head,
    /// What the names of the encoder's own tensors begin with; the head's have none.
    prefix: &'static str,
}

/// The names of one block's parts, each with a `weight` and a `bias`.
pub struct Block {
    pub query: String,
    pub key: String,
    pub value: String,
    pub attended: String,
    pub attention_norm: String,
    pub intermediate: String,
    pub output: String,
    pub output_norm: String,
}

/// The keys of `config.json` that are looked at. DistilBERT has names of its own.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    architectures: Vec<String>,
    vocab_size: usize,
    #[serde(alias = "dim")]
    hidden_size: usize,
    #[serde(alias = "n_layers")]
    num_hidden_layers: usize,
    #[serde(alias = "n_heads")]
    num_attention_heads: usize,
    #[serde(alias = "hidden_dim")]
    intermediate_size: usize,
    #[serde(alias = "activation")]
    hidden_act: String,
    max_position_embeddings: usize,
    #[serde(default = "two")]
    type_vocab_size: usize,
    layer_norm_eps: Option<f64>,
    pad_token_id: Option<usize>,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
    num_labels: Option<usize>,
    id2label: Option<BTreeMap<String, String>>,
    problem_type: Option<String>,
    transformers_version: Option<String>,
}

fn two() -> usize {
    2
}

/// The architectures that are computed, with the family of each and what it ends in.
const ARCHITECTURES: [(&str, Family, End); 12] = [
    ("BertModel", Family::Bert, End::Hidden),
    ("BertForMaskedLM", Family::Bert, End::Hidden),
    ("BertForSequenceClassification", Family::Bert, End::Classes),
    ("DistilBertModel", Family::DistilBert, End::Hidden),
    ("DistilBertForMaskedLM", Family::DistilBert, End::Hidden),
    ("DistilBertForSequenceClassification", Family::DistilBert, End::Classes),
    ("RobertaModel", Family::Roberta, End::Hidden),
    ("RobertaForMaskedLM", Family::Roberta, End::Hidden),
    ("RobertaForSequenceClassification", Family::Roberta, End::Classes),
    ("XLMRobertaModel", Family::Roberta, End::Hidden),
    ("XLMRobertaForMaskedLM", Family::Roberta, End::Hidden),
    ("XLMRobertaForSequenceClassification", Family::Roberta, End::Classes),
];

#[derive(Clone, Copy, PartialEq)]
enum End {
    Hidden,
    Classes,
}

impl Family {
    fn prefix(self) -> &'static str {
        match self {
            Family::Bert => "bert.",
            Family::DistilBert => "distilbert.",
            Family::Roberta => "roberta.",
        }
    }
}

impl Encoder {
    /// `pooled`: how a row's embedding is made, where there is to be one.
    fn new(config: &Config, settings: &EncoderConfig, pooled: Option<(Pooling, bool)>) -> Result<Encoder, String> {
        let (family, end) = architecture(config)?;
        let padding = config.pad_token_id.unwrap_or(if family == Family::Roberta { 1 } else { 0 });
        let skipped = if family == Family::Roberta { padding + 1 } else { 0 };
        let positions = config.max_position_embeddings;
        let head = match (end, pooled) {
            (End::Classes, _) => Head::Classes { count: classes(config) },
            (End::Hidden, Some((pooling, normalize))) => Head::Embedding { pooling, normalize },
            (End::Hidden, None) => Head::Hidden,
        };
        let encoder = Encoder {
            family,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            vocabulary: config.vocab_size,
            tokens: positions.saturating_sub(skipped),
            positions,
            token_types: if family == Family::DistilBert { 0 } else { config.type_vocab_size },
            token_type_input: settings.token_type_ids,
            padding,
            eps: config.layer_norm_eps.unwrap_or(1e-12),
            activation: activation(&config.hidden_act)?,
            head,
            prefix: "",
        };
        encoder.check()?;
        Ok(encoder)
    }

    /// Sizes that can be added up, and divided by each other.
    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("hidden_size", self.hidden, MAX_SIZE),
            ("num_hidden_layers", self.layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, MAX_SIZE),
            ("intermediate_size", self.intermediate, MAX_SIZE),
            ("vocab_size", self.vocabulary, MAX_SIZE),
            ("max_position_embeddings", self.tokens, MAX_SIZE),
            ("id2label", if let Head::Classes { count } = self.head { count } else { 1 }, MAX_SIZE),
        ];
        if let Some((name, found, max)) = sizes.iter().find(|(_, found, max)| !(1..=*max).contains(found)) {
            return Err(format!("{name} comes to {found}, expected 1 to {max}"));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            let (heads, hidden) = (self.heads, self.hidden);
            return Err(format!("{heads} attention heads share a hidden size of {hidden}, expected equal shares"));
        }
        if self.token_type_input && self.token_types == 0 {
            return Err("model.toml asks for token_type_ids, which this encoder does not have".into());
        }
        Ok(())
    }

    /// The elements of the largest tensor that one row of so many tokens needs: the scores of each token for each, or what
    /// stands between the layers.
    pub fn row_elements(&self, tokens: usize) -> usize {
        let scores = self.heads.saturating_mul(tokens);
        tokens.saturating_mul(scores.max(self.intermediate).max(self.hidden))
    }

    pub fn embeddings(&self, part: &str) -> String {
        format!("{}embeddings.{part}", self.prefix)
    }

    pub fn block(&self, number: usize) -> Block {
        let prefix = self.prefix;
        match self.family {
            Family::DistilBert => {
                let name = |part: &str| format!("{prefix}transformer.layer.{number}.{part}");
                Block {
                    query: name("attention.q_lin"),
                    key: name("attention.k_lin"),
                    value: name("attention.v_lin"),
                    attended: name("attention.out_lin"),
                    attention_norm: name("sa_layer_norm"),
                    intermediate: name("ffn.lin1"),
                    output: name("ffn.lin2"),
                    output_norm: name("output_layer_norm"),
                }
            }
            Family::Bert | Family::Roberta => {
                let name = |part: &str| format!("{prefix}encoder.layer.{number}.{part}");
                Block {
                    query: name("attention.self.query"),
                    key: name("attention.self.key"),
                    value: name("attention.self.value"),
                    attended: name("attention.output.dense"),
                    attention_norm: name("attention.output.LayerNorm"),
                    intermediate: name("intermediate.dense"),
                    output: name("output.dense"),
                    output_norm: name("output.LayerNorm"),
                }
            }
        }
    }

    /// The two dense layers that make logits of the first token's hidden state.
    pub fn classifier(&self) -> (String, String) {
        match self.family {
            Family::Bert => (format!("{}pooler.dense", self.prefix), "classifier".into()),
            Family::DistilBert => ("pre_classifier".into(), "classifier".into()),
            Family::Roberta => ("classifier.dense".into(), "classifier.out_proj".into()),
        }
    }

    /// Every tensor it computes with.
    fn needed(&self) -> Vec<Needed> {
        let mut needed = Vec::new();
        let mut add = |name: String, dims: Vec<usize>| needed.push(Needed { name, dims });
        let hidden = self.hidden;
        add(self.embeddings("word_embeddings.weight"), vec![self.vocabulary, hidden]);
        add(self.embeddings("position_embeddings.weight"), vec![self.positions, hidden]);
        if self.token_types > 0 {
            add(self.embeddings("token_type_embeddings.weight"), vec![self.token_types, hidden]);
        }
        let mut pair = |name: &str, weight: Vec<usize>| {
            let width = weight[0];
            add(format!("{name}.weight"), weight);
            add(format!("{name}.bias"), vec![width]);
        };
        pair(&self.embeddings("LayerNorm"), vec![hidden]);
        for number in 0..self.layers {
            let block = self.block(number);
            for square in [&block.query, &block.key, &block.value, &block.attended] {
                pair(square, vec![hidden, hidden]);
            }
            pair(&block.attention_norm, vec![hidden]);
            pair(&block.intermediate, vec![self.intermediate, hidden]);
            pair(&block.output, vec![hidden, self.intermediate]);
            pair(&block.output_norm, vec![hidden]);
        }
        if let Head::Classes { count } = self.head {
            let (dense, out) = self.classifier();
            pair(&dense, vec![hidden, hidden]);
            pair(&out, vec![count, hidden]);
        }
        needed
    }

    fn signature(&self) -> Signature {
        let free = |name: &str| Dim::Free(Some(name.into()));
        let spec = |name: &str, dtype, dims| TensorSpec { name: name.into(), dtype, dims: Some(dims) };
        let tokens = |name: &str| spec(name, DataType::Int64, vec![free("batch"), free("sequence")]);
        let mut inputs = vec![tokens(INPUT_IDS), tokens(ATTENTION_MASK)];
        if self.token_type_input {
            inputs.push(tokens(TOKEN_TYPE_IDS));
        }
        let floats = |name: &str, dims| spec(name, DataType::Fp32, dims);
        let states = || floats(LAST_HIDDEN_STATE, vec![free("batch"), free("sequence"), Dim::Fixed(self.hidden)]);
        let outputs = match self.head {
            Head::Hidden => vec![states()],
            Head::Embedding { .. } => {
                vec![states(), floats(SENTENCE_EMBEDDING, vec![free("batch"), Dim::Fixed(self.hidden)])]
            }
            Head::Classes { count } => vec![floats(LOGITS, vec![free("batch"), Dim::Fixed(count)])],
        };
        Signature { inputs, outputs }
    }
}

fn architecture(config: &Config) -> Result<(Family, End), String> {
    let known = || ARCHITECTURES.map(|(name, ..)| name).join(", ");
    let found = match config.architectures.as_slice() {
        [name] => ARCHITECTURES.iter().find(|(known, ..)| known == name),
        _ => None,
    };
    let Some((_, family, end)) = found else {
        let names: Vec<String> = config.architectures.iter().map(|name| quoted(name)).collect();
        return Err(format!("architectures [{}], expected one of {}", listed(&names, String::clone), known()));
    };
    match config.position_embedding_type.as_deref() {
        None | Some("absolute") => {}
        Some(other) => return Err(format!("position_embedding_type `{}`, expected `absolute`", quoted(other))),
    }
    if config.is_decoder {
        return Err("is_decoder is true, expected an encoder".into());
    }
    Ok((*family, *end))
}

fn activation(name: &str) -> Result<Activation, String> {
    Ok(match name {
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        _ => return Err(format!("activation `{}`, expected gelu, gelu_new, relu or silu", quoted(name))),
    })
}

/// As transformers counts them: by the names, else by the number, else two.
fn classes(config: &Config) -> usize {
    config.id2label.as_ref().map(BTreeMap::len).or(config.num_labels).unwrap_or(2)
}

/// The classes' names, where `0`, `1`, … are all there.
fn labels(config: &Config, count: usize) -> Option<Arc<[String]>> {
    let names = config.id2label.as_ref()?;
    (0..count).map(|id| names.get(&id.to_string()).cloned()).collect()
}

/// One of the modules that sentence-transformers runs one after the other.
#[derive(Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

/// Older and newer versions of sentence-transformers; every other mode must be off.
#[derive(Deserialize)]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode: Option<String>,
    #[serde(flatten)]
    switches: BTreeMap<String, serde_json::Value>,
}

impl PoolingConfig {
    fn mode(&self) -> Result<Pooling, String> {
        let on = |(name, value): (&String, &serde_json::Value)| {
            (name.starts_with("pooling_mode_") && *value == serde_json::Value::Bool(true)).then(|| name.clone())
        };
        let mut modes: Vec<String> = self.switches.iter().filter_map(on).collect();
        modes.extend(self.pooling_mode.clone());
        match modes.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["pooling_mode_cls_token" | "cls"] => Ok(Pooling::Cls),
            ["pooling_mode_mean_tokens" | "mean"] => Ok(Pooling::Mean),
            ["pooling_mode_max_tokens" | "max"] => Ok(Pooling::Max),
            _ => Err(format!(
                "pooling by [{}], expected one of pooling_mode_cls_token, pooling_mode_mean_tokens and \
                 pooling_mode_max_tokens",
                listed(&modes, |mode| quoted(mode))
            )),
        }
    }
}

/// Whether the folder pools at all, and whether it normalises what it pooled.
fn modules(folder: &Path) -> Result<Option<bool>, LoadError> {
    if !folder.join(MODULES_FILE).exists() {
        return Ok(None);
    }
    let modules: Vec<Module> = read_json(folder, MODULES_FILE, MAX_JSON_BYTES)?;
    let kinds: Vec<&str> = modules.iter().map(|module| module.kind.rsplit('.').next().unwrap_or_default()).collect();
    let pooled_here =
        modules.get(1).is_none_or(|module| POOLING_FILE.strip_suffix("/config.json") == Some(&module.path));
    match kinds[..] {
        ["Transformer"] => Ok(None),
        ["Transformer", "Pooling"] if pooled_here => Ok(Some(false)),
        ["Transformer", "Pooling", "Normalize"] if pooled_here => Ok(Some(true)),
        _ => Err(bad(format!(
            "{MODULES_FILE}: modules {}, expected Transformer, Pooling in `1_Pooling` and Normalize",
            quoted(&kinds.join(", "))
        ))),
    }
}

/// The file that says how the folder pools, if it does and that matters.
pub fn pooling_file(folder: &Path, settings: &EncoderConfig) -> Result<Option<String>, LoadError> {
    let config: Config = read_json(folder, ENCODER_FILE, MAX_JSON_BYTES)?;
    // An architecture that is not known is refused once all is read.
    let pools = architecture(&config).is_ok_and(|(_, end)| end == End::Hidden);
    if !pools || settings.pooling.is_some() {
        return Ok(None);
    }
    Ok(modules(folder)?.map(|_| POOLING_FILE.to_string()))
}

/// How a row's embedding is made: as `model.toml` says, else as the folder does, which is read only where that matters.
fn pooled(folder: &Path, end: End, settings: &EncoderConfig) -> Result<Option<(Pooling, bool)>, LoadError> {
    let EncoderConfig { pooling, normalize, .. } = *settings;
    if end == End::Classes {
        return match pooling.is_some() || normalize.is_some() {
            true => {
                Err(bad("model.toml sets pooling or normalize for a classifier, expected neither: it pools nothing"))
            }
            false => Ok(None),
        };
    }
    let (pooling, normalize) = match (pooling, normalize) {
        (Some(pooling), Some(normalize)) => (pooling, normalize),
        (Some(pooling), None) => (pooling, modules(folder)?.unwrap_or(false)),
        (None, _) => match modules(folder)? {
            Some(as_listed) => (folder_pooling(folder)?, normalize.unwrap_or(as_listed)),
            None if normalize.is_some() => {
                return Err(bad("model.toml sets normalize where nothing is pooled, expected pooling, too"));
            }
            None => return Ok(None),
        },
    };
    Ok(Some((pooling, normalize)))
}

fn folder_pooling(folder: &Path) -> Result<Pooling, LoadError> {
    let config: PoolingConfig = read_json(folder, POOLING_FILE, MAX_JSON_BYTES)?;
    config.mode().map_err(|reason| bad(format!("{POOLING_FILE}: {reason}")))
}

/// Reads `config.json`, compares it with the tensors, and says what they make together.
pub fn describe(folder: &Path, settings: &EncoderConfig, mut weights: Weights) -> Result<Description, LoadError> {
    let config: Config = read_json(folder, ENCODER_FILE, MAX_JSON_BYTES)?;
    let wrong = |reason: String| bad(format!("{ENCODER_FILE}: {reason}"));
    let (_, end) = architecture(&config).map_err(wrong)?;
    let mut encoder = Encoder::new(&config, settings, pooled(folder, end, settings)?).map_err(wrong)?;
    let prefix = encoder.family.prefix();
    if weights.places.keys().any(|name| name.starts_with(prefix)) {
        encoder.prefix = prefix;
    }
    rename_old(&mut weights);
    let unused = weights.check(&encoder.needed())?;
    // A buffer that older versions of transformers saved.
    let unused: Vec<String> = unused.into_iter().filter(|name| !name.ends_with("embeddings.position_ids")).collect();
    let mut warnings = Vec::new();
    if !unused.is_empty() {
        warnings.push(format!("tensors that this architecture does not use: {}", listed(&unused, |name| quoted(name))));
    }
    let signature = encoder.signature();
    let kind = match encoder.head {
        Head::Classes { count } if count >= 2 && single_label(&config) => OutputKind::Logits,
        _ => OutputKind::Values,
    };
    Ok(Description {
        output_kinds: vec![kind; signature.outputs.len()],
        couples_rows: None,
        labels: if let Head::Classes { count } = encoder.head { labels(&config, count) } else { None },
        producer: config
            .transformers_version
            .as_ref()
            .map(|v| format!("transformers {}", quoted(v)))
            .unwrap_or_default(),
        signature,
        warnings,
        places: weights.places,
        architecture: Architecture::Encoder(encoder),
    })
}

/// Several labels at once, or a number, are no distribution over classes.
fn single_label(config: &Config) -> bool {
    config.problem_type.as_deref().is_none_or(|kind| kind == "single_label_classification")
}

/// The first BERT files call a norm's weight `gamma` and its bias `beta`.
fn rename_old(weights: &mut Weights) {
    for (old, new) in [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")] {
        let found: Vec<String> = weights.places.keys().filter(|name| name.ends_with(old)).cloned().collect();
        for name in found {
            let renamed = name.replace(old, new);
            if !weights.places.contains_key(&renamed)
                && let Some(place) = weights.places.remove(&name)
            {
                weights.places.insert(renamed, place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::super::weights::tests::floats;
    use super::super::{Declared, MODEL_FILE, files};
    use super::*;

    /// A folder of an encoder of one block whose tensors are those it needs, changed by `change`.
    struct Setup {
        folder: tempfile::TempDir,
        config: serde_json::Value,
        settings: EncoderConfig,
        rename: fn(String) -> String,
    }

    impl Setup {
        fn new(architecture: &str) -> Setup {
            let config = json!({
                "architectures": [architecture], "vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 1,
                "num_attention_heads": 2, "intermediate_size": 6, "hidden_act": "gelu", "max_position_embeddings": 9,
                "type_vocab_size": 2, "pad_token_id": 1, "transformers_version": "4.57.0",
            });
            let (folder, settings) = (tempfile::tempdir().unwrap(), EncoderConfig::default());
            Setup { folder, config, settings, rename: |name| name }
        }

        fn set(mut self, key: &str, value: serde_json::Value) -> Setup {
            self.config[key] = value;
            self
        }

        fn file(self, name: &str, content: serde_json::Value) -> Setup {
            let path = self.folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content.to_string()).unwrap();
            self
        }

        fn read(&self) -> Result<Description, String> {
            let folder = self.folder.path();
            fs::write(folder.join(ENCODER_FILE), self.config.to_string()).unwrap();
            if let Ok(config) = serde_json::from_value(self.config.clone())
                && let Ok(encoder) = Encoder::new(&config, &EncoderConfig::default(), None)
            {
                let needed = encoder.needed();
                let tensors: Vec<(String, Vec<usize>)> =
                    needed.into_iter().map(|needed| ((self.rename)(needed.name), needed.dims)).collect();
                let tensors: Vec<(&str, &[usize])> = tensors.iter().map(|(name, dims)| (&**name, &dims[..])).collect();
                fs::write(folder.join(MODEL_FILE), floats(&tensors)).unwrap();
            } else {
                fs::write(folder.join(MODEL_FILE), floats(&[])).unwrap();
            }
            let declared = Declared::Encoder(self.settings.clone());
            files(folder, &declared)
                .and_then(|_| Description::read(folder, &declared))
                .map_err(|error| error.to_string())
        }
    }

    fn outputs(description: &Description) -> Vec<(String, Vec<i64>)> {
        description.signature.outputs.iter().map(|spec| (spec.name.to_string(), spec.to_wire())).collect()
    }

    #[test]
    fn every_architecture_has_its_outputs() {
        for (name, family, end) in ARCHITECTURES {
            let description = Setup::new(name).read().unwrap_or_else(|error| panic!("{name}: {error}"));
            let expected = match end {
                End::Hidden => ("last_hidden_state".to_string(), vec![-1, -1, 4]),
                End::Classes => ("logits".to_string(), vec![-1, 2]),
            };
            assert_eq!(outputs(&description), [expected], "{name}");
            let Architecture::Encoder(encoder) = &description.architecture else { panic!() };
            assert_eq!(encoder.tokens, if family == Family::Roberta { 7 } else { 9 }, "{name}");
            assert_eq!((&*description.producer, description.warnings.len()), ("transformers 4.57.0", 0));
            assert_eq!(description.signature.inputs.len(), 2);
        }
    }

    #[test]
    fn prefixes_and_old_names_are_understood() {
        let mut setup = Setup::new("BertModel");
        setup.rename = |name| format!("bert.{}", name.replace("LayerNorm.weight", "LayerNorm.gamma"));
        let description = setup.read().unwrap();
        assert!(description.places.contains_key("bert.embeddings.LayerNorm.weight"));
        setup.rename = |name| name.replace("layer.0.output.dense.bias", "layer.0.output.dense.bais");
        assert_eq!(
            setup.read().unwrap_err(),
            "tensor `encoder.layer.0.output.dense.bias` is missing, expected [4]; \
             `encoder.layer.0.output.dense.bais`, perhaps, which nothing uses"
        );
    }

    #[test]
    fn what_an_architecture_leaves_out_is_a_warning() {
        let setup = Setup::new("BertForSequenceClassification");
        setup.read().unwrap();
        let plain = setup.set("architectures", json!(["BertModel"]));
        fs::write(plain.folder.path().join(ENCODER_FILE), plain.config.to_string()).unwrap();
        let description = Description::read(plain.folder.path(), &Declared::Encoder(plain.settings)).unwrap();
        assert_eq!(
            description.warnings,
            ["tensors that this architecture does not use: classifier.bias; classifier.weight; pooler.dense.bias; \
              pooler.dense.weight"]
        );
    }

    #[test]
    fn classes_have_the_names_of_the_file() {
        let named = |names: serde_json::Value| Setup::new("RobertaForSequenceClassification").set("id2label", names);
        let description = named(json!({"0": "no", "1": "yes", "2": "maybe"})).read().unwrap();
        assert_eq!(description.labels.as_deref(), Some(&["no".into(), "yes".into(), "maybe".into()][..]));
        assert_eq!(description.output_kinds, [OutputKind::Logits]);
        assert_eq!(outputs(&description)[0].1, [-1, 3]);
        assert_eq!(named(json!({"0": "no", "7": "yes"})).read().unwrap().labels, None);
        let several = named(json!({"0": "a", "1": "b"})).set("problem_type", json!("multi_label_classification"));
        assert_eq!(several.read().unwrap().output_kinds, [OutputKind::Values]);
        assert_eq!(named(json!({"0": "score"})).read().unwrap().output_kinds, [OutputKind::Values]);
        assert!(named(json!({})).read().unwrap_err().contains("id2label comes to 0"));
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let with = |key: &str, value| Setup::new("BertModel").set(key, value).read().unwrap_err();
        assert!(
            with("architectures", json!(["GPT2Model"])).contains("architectures [GPT2Model], expected one of Bert")
        );
        assert!(with("architectures", json!([])).contains("architectures []"));
        assert!(with("position_embedding_type", json!("relative_key")).contains("expected `absolute`"));
        assert!(with("is_decoder", json!(true)).contains("expected an encoder"));
        assert!(with("hidden_act", json!("quick_gelu")).contains("activation `quick_gelu`"));
        assert!(with("num_attention_heads", json!(3)).contains("3 attention heads share a hidden size of 4"));
        assert!(with("num_attention_heads", json!(0)).contains("num_attention_heads comes to 0"));
        assert!(with("num_hidden_layers", json!(1_000_000)).contains("expected 1 to 1024"));
        assert!(with("vocab_size", json!(-1)).starts_with("config.json: "));
        assert!(with("vocab_size", json!(u64::MAX)).contains("vocab_size comes to"));
        let roberta = Setup::new("RobertaModel").set("pad_token_id", json!(100));
        assert!(roberta.read().unwrap_err().contains("max_position_embeddings comes to 0"));
        let mut typed = Setup::new("DistilBertModel");
        typed.settings.token_type_ids = true;
        assert!(typed.read().unwrap_err().contains("which this encoder does not have"));
    }

    #[test]
    fn settings_without_effect_are_refused() {
        let with = |architecture: &str, pooling, normalize| {
            let mut setup = Setup::new(architecture);
            setup.settings = EncoderConfig { pooling, normalize, ..Default::default() };
            setup.read().map(|description| outputs(&description).len())
        };
        let lone = "model.toml sets normalize where nothing is pooled, expected pooling, too";
        assert_eq!(with("BertModel", None, Some(true)), Err(lone.to_string()));
        assert_eq!(with("BertModel", None, Some(false)), Err(lone.to_string()));
        assert_eq!(with("BertModel", Some(Pooling::Max), Some(true)), Ok(2));
        assert_eq!(with("BertModel", Some(Pooling::Max), None), Ok(2));
        for (pooling, normalize) in [(Some(Pooling::Mean), None), (None, Some(false))] {
            let refusal = with("RobertaForSequenceClassification", pooling, normalize).unwrap_err();
            assert_eq!(
                refusal,
                "model.toml sets pooling or normalize for a classifier, expected neither: it pools nothing"
            );
        }
        let modules = json!([{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]);
        let classifier = Setup::new("BertForSequenceClassification").file(MODULES_FILE, modules);
        assert_eq!(outputs(&classifier.read().unwrap()), [("logits".to_string(), vec![-1, 2])], "nothing is pooled");
    }

    #[test]
    fn sentence_transformers_pool_as_the_folder_says() {
        let module =
            |kind: &str, path: &str| json!({"path": path, "type": format!("sentence_transformers.models.{kind}")});
        let sentences = |modules: Vec<serde_json::Value>| Setup::new("BertModel").file(MODULES_FILE, json!(modules));
        let (transformer, pooling) = (module("Transformer", ""), module("Pooling", "1_Pooling"));
        let normalize = module("Normalize", "2_Normalize");
        let both = vec![transformer.clone(), pooling.clone(), normalize];
        let mean =
            json!({"word_embedding_dimension": 4, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true});
        let head = |description: Description| match description.architecture {
            Architecture::Encoder(encoder) => encoder.head,
            Architecture::Sequential(_) => panic!(),
        };
        let setup = sentences(both.clone()).file(POOLING_FILE, mean.clone());
        let description = setup.read().unwrap();
        assert_eq!(outputs(&description)[1], ("sentence_embedding".to_string(), vec![-1, 4]));
        assert_eq!(head(description), Head::Embedding { pooling: Pooling::Mean, normalize: true });

        let mut overridden = sentences(both.clone()).file(POOLING_FILE, mean.clone());
        overridden.settings =
            EncoderConfig { pooling: Some(Pooling::Cls), normalize: Some(false), ..Default::default() };
        assert_eq!(head(overridden.read().unwrap()), Head::Embedding { pooling: Pooling::Cls, normalize: false });

        let unread = overridden.file(POOLING_FILE, json!({"pooling_mode": "lasttoken"}));
        let files = files(unread.folder.path(), &Declared::Encoder(unread.settings.clone())).unwrap();
        assert!(!files.contains(POOLING_FILE), "{files:?}");
        assert_eq!(head(unread.read().unwrap()), Head::Embedding { pooling: Pooling::Cls, normalize: false });

        let plain =
            sentences(vec![transformer.clone(), pooling.clone()]).file(POOLING_FILE, json!({"pooling_mode": "max"}));
        assert_eq!(head(plain.read().unwrap()), Head::Embedding { pooling: Pooling::Max, normalize: false });
        let dense = sentences(vec![transformer.clone(), pooling, module("Dense", "2_Dense")]).file(POOLING_FILE, mean);
        assert!(dense.read().unwrap_err().contains("modules Transformer, Pooling, Dense, expected"));
        let elsewhere = sentences(vec![transformer, module("Pooling", "../../x")]);
        assert!(elsewhere.read().unwrap_err().contains("expected Transformer, Pooling in `1_Pooling`"));
        let twice = json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true});
        assert!(
            sentences(both)
                .file(POOLING_FILE, twice)
                .read()
                .unwrap_err()
                .contains("pooling by [pooling_mode_cls_token;")
        );
    }
}
