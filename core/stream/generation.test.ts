import { describe, expect, test } from '@jest/globals'
import { FIRST_GENERATION, generationError, judgeGeneration } from './index.ts'

describe('generations', () => {
  test.each([
    [1, 1, 'current'], [7, 7, 'current'], [1, 2, 'superseded'], [1, 9, 'superseded'], [2, 1, 'ahead'], [9, 8, 'ahead'],
  ] as const)('a stream of generation %i at a site that holds %i is %s', (sent, held, verdict) => {
    expect(judgeGeneration(sent, held)).toBe(verdict)
    const error = generationError('shop', sent, held, 'why so')
    expect(error?.code).toBe({ current: undefined, superseded: 'FENCED', ahead: 'GENERATION_AHEAD' }[verdict])
    if (error === undefined) return
    expect(error.message).toContain(`generation ${held}`)
    expect(error.hint).toMatch(/\.$/)
    expect(error.context).toEqual({ vpg: 'shop', generation: held })
    // Both wait for somebody to do something: trying again changes nothing.
    expect(error.retry).toBe(false)
  })

  test('they begin with 1, and a reason is told only where there is one', () => {
    expect(FIRST_GENERATION).toBe(1)
    expect(generationError('shop', 1, 2, 'failed over')?.message).toContain(': failed over')
    expect(generationError('shop', 1, 2)?.message).not.toContain('undefined')
  })
})
