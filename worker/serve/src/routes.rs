//! Which version answers which request: a picture of the moment that never changes, replaced as a
//! whole. Whoever took it goes on with what is in it.

use std::{collections::HashMap, sync::Arc};

use emberline_common::{
    ids::ModelName,
    serving::{ServingLimits, share_of},
};

use crate::{
    error::{InferError, cut, listed},
    feedback::Answered,
    version::Version,
};

/// All models.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    pub models: HashMap<ModelName, Arc<Route>>,
}

/// One model.
#[derive(Debug)]
pub(crate) struct Route {
    pub model: ModelName,
    pub limits: ServingLimits,
    pub peers: Vec<String>,
    /// Who answers what no canary takes.
    pub live: Option<Arc<Version>>,
    pub canary: Option<(u16, Arc<Version>)>,
    pub shadow: Option<(u16, Arc<Version>)>,
    /// All that are loaded.
    pub ready: Vec<Arc<Version>>,
    /// Those that are not, and why.
    pub waiting: Vec<(u32, String)>,
    /// What was answered not long ago.
    pub answered: Arc<Answered>,
}

impl Routes {
    /// The model of that name.
    pub fn find(&self, model: &str) -> Result<&Arc<Route>, InferError> {
        self.models.get(model).ok_or_else(|| {
            let there = match self.models.is_empty() {
                true => "this server has none yet".to_owned(),
                false => {
                    let mut names: Vec<&str> = self.models.keys().map(ModelName::as_str).collect();
                    names.sort_unstable();
                    format!("there are {}", listed(names.into_iter()))
                }
            };
            InferError::NotFound(format!("there is no model `{}` here; {there}", cut(model)))
        })
    }
}

impl Route {
    /// Who answers the request with that id; if a version is named, that one.
    pub fn pick(&self, version: &str, id: &str) -> Result<&Arc<Version>, InferError> {
        if !version.is_empty() {
            return self.named(version);
        }
        if let Some((share, canary)) = &self.canary
            && share_of(self.model.as_str(), id) < *share
        {
            return Ok(canary);
        }
        self.live()
    }

    fn live(&self) -> Result<&Arc<Version>, InferError> {
        self.live.as_ref().ok_or_else(|| {
            let why = self.waiting.first();
            let why = why.map_or_else(
                || "no version of it is live".to_owned(),
                |(version, why)| format!("version {version} {why}"),
            );
            InferError::NotReady(format!("the model `{}` is not ready: {why}", self.model))
        })
    }

    /// The version that is named, or the live one.
    pub fn named(&self, version: &str) -> Result<&Arc<Version>, InferError> {
        if version.is_empty() {
            return self.live();
        }
        if let Some(found) = self.ready.iter().find(|v| v.text == version) {
            return Ok(found);
        }
        let waits = self.waiting.iter().find(|(v, _)| v.to_string() == version);
        Err(match waits {
            Some((version, why)) => InferError::NotReady(format!(
                "version {version} of the model `{}` is not ready: it {why}",
                self.model
            )),
            None => {
                let there: Vec<&str> = self.ready.iter().map(|v| v.text.as_str()).collect();
                InferError::NotFound(format!(
                    "the model `{}` has no version `{}` here; there are {}",
                    self.model,
                    cut(version),
                    listed(there.into_iter())
                ))
            }
        })
    }

    /// Who gets a copy of the request with that id, beside whoever answers it.
    pub fn shadow_of(&self, id: &str, answering: &Arc<Version>) -> Option<&Arc<Version>> {
        let (share, shadow) = self.shadow.as_ref()?;
        let taken = share_of(self.model.as_str(), id) < *share;
        (taken && !Arc::ptr_eq(shadow, answering)).then_some(shadow)
    }
}
