// That there is assembly lets Go functions without a body be declared.
