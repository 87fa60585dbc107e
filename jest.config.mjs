export default {
  testEnvironment: 'node',
  testMatch: ['<rootDir>/{core,plugin,agent,cli,test}/**/*.test.ts'],
  modulePathIgnorePatterns: ['<rootDir>/dist/', '<rootDir>/.cache/'],
  extensionsToTreatAsEsm: ['.ts'],
  transform: { '\\.ts$': ['@swc/jest', { jsc: { parser: { syntax: 'typescript' }, target: 'es2024' }, module: { type: 'es6' } }] },
  reporters: ['default', '<rootDir>/scripts/totals-reporter.mjs'],
  setupFiles: ['<rootDir>/test/kit/globals.ts'],
  testTimeout: 30_000,
}
