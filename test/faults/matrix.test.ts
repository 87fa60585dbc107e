import { expect, test } from '@jest/globals'
import { ALL_CELLS, COMPONENTS, FAULTS, nameOf, PHASES, SHORT_CELLS, tableOf, whyLeftOut } from './matrix.ts'

test('every component, every fault and every phase has a cell, and what is left out has a reason', () => {
  for (const component of COMPONENTS) expect(ALL_CELLS.some((cell) => cell.component === component)).toBe(true)
  for (const fault of FAULTS) expect(ALL_CELLS.some((cell) => cell.fault === fault)).toBe(true)
  for (const phase of PHASES) expect(ALL_CELLS.some((cell) => cell.phase === phase)).toBe(true)
  const all = COMPONENTS.length * FAULTS.length * PHASES.length
  const leftOut = COMPONENTS.flatMap((component) => FAULTS.flatMap((fault) => PHASES.flatMap((phase) => whyLeftOut({ component, fault, phase }) ?? [])))
  expect(ALL_CELLS.length + leftOut.length).toBe(all)
  expect(new Set(ALL_CELLS.map(nameOf)).size).toBe(ALL_CELLS.length)
  expect(ALL_CELLS.map(nameOf)).toEqual(expect.arrayContaining(SHORT_CELLS.map(nameOf)))
})

test('the table has a row for each component and fault, and a dash for what is left out', () => {
  const lines = tableOf(() => 'ok').split('\n')
  expect(lines).toHaveLength(1 + COMPONENTS.length * FAULTS.length)
  expect(lines.find((line) => line.startsWith('link / cut '))).toMatch(/^link \/ cut +ok +ok +- +ok +ok +ok +ok$/)
})
