"""Loads the class of the installed package `transformers-nextflow`."""

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowModel
